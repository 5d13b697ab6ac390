# Licensed under the Apache License, Version 2.0
"""What the blocks of a model become by being fitted: in memory, and in files for a model that is cut piece by piece later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from ..utils.tensor_files import TensorReader


if TYPE_CHECKING:
    from ..experts import ExpertBlock


@dataclass(frozen=True)
class FittedBlock:
    """What the down projections of one block become.

    Attributes:
        rows (`list[torch.Tensor]`): of each expert the kept rows, in the order of the plan, [w, d].
        shared (`dict[str, torch.Tensor]`): by full name, the whole weights [d, I] of down projections of shared experts.
        error_before (`float`): squared error of the block's routed output after plain removal, relative to the squared
            output, over the calibration tokens.
        error_after (`float`): the same with these down projections.
    """

    rows: list[torch.Tensor]
    shared: dict[str, torch.Tensor]
    error_before: float
    error_after: float


class FittedFiles:
    """What blocks become, in files: for a model that is cut piece by piece, later.

    Args:
        folder (`Path`): is made; whoever made the one around it removes it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self._reader: TensorReader | None = None

    def keep(self, block: ExpertBlock, fitted: FittedBlock) -> None:
        """Writes one block."""
        rows = {f"{block.path}.{expert}": part.contiguous() for expert, part in enumerate(fitted.rows)}
        shared = {name: weight.contiguous() for name, weight in fitted.shared.items()}
        save_file({**rows, **shared}, self.folder / f"{block.path}.safetensors")

    def rows(self, path: str, expert: int) -> torch.Tensor:
        """Kept rows of one expert, [w, d]."""
        return self._read(f"{path}.{expert}")

    def shared(self, name: str) -> torch.Tensor | None:
        """A parameter that is no routed expert's, if it was fitted, too."""
        return self._read(name) if name in self._files.tensors else None

    @property
    def _files(self) -> TensorReader:
        if self._reader is None:
            self._reader = TensorReader(self.folder.glob("*.safetensors"))
        return self._reader

    def _read(self, name: str) -> torch.Tensor:
        return self._files.read(name)
