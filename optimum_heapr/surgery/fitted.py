# Licensed under the Apache License, Version 2.0
"""What the blocks of a model become by being fitted: in memory, and in files for a model that is cut piece by piece later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from ..utils.tensor_files import TensorReader
from .selection import cut_block, load_rows


if TYPE_CHECKING:
    from ..experts import ExpertBlock
    from ..modeling.atomic_experts import AtomicExperts


@dataclass(frozen=True)
class FittedBlock:
    """What the parameters of one block become.

    Attributes:
        rows (`list[torch.Tensor]`): of each expert the kept rows of the down projection, in the order of the plan, [w, d].
        shared (`dict[str, torch.Tensor]`): by full name, the whole weights of shared experts that change.
        error_before (`float`): squared error of the block's routed output after plain removal, relative to the squared
            output, over the calibration tokens.
        error_after (`float`): the same with these down projections.
        trained (`dict[str, list[torch.Tensor]]`): by name of another parameter, its kept rows of each expert, as
            [`~optimum_heapr.surgery.selection.set_rows`] takes them; empty unless they were trained.
    """

    rows: list[torch.Tensor]
    shared: dict[str, torch.Tensor]
    error_before: float
    error_after: float
    trained: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def experts(self) -> dict[str, list[torch.Tensor]]:
        """By parameter, the kept rows of each expert, of all parameters that change."""
        return {"down_proj": self.rows, **self.trained}

    def module(self, block: ExpertBlock, kept: list[torch.Tensor]) -> AtomicExperts:
        """The experts that the block becomes, cut, in the type and on the device of its weights."""
        experts = cut_block(block, kept)
        for parameter, rows in self.experts.items():
            load_rows(experts, parameter, rows)
        return experts


@contextmanager
def in_place_of(
    model: torch.nn.Module,
    blocks: list[ExpertBlock],
    kept: dict[str, list[torch.Tensor]],
    fitted: dict[str, FittedBlock],
) -> Iterator[list[ExpertBlock]]:
    """Until it ends these blocks of the unpruned model are what they become, both by their paths; yields those."""
    shared = {name: weight for found in fitted.values() for name, weight in found.shared.items()}
    before = {name: model.get_parameter(name).data for name in shared}
    try:
        cut = [replace(block, module=fitted[block.path].module(block, kept[block.path])) for block in blocks]
        for block in cut:
            model.set_submodule(block.path, block.module)
        for name, weight in shared.items():
            model.get_parameter(name).data = weight
        yield cut
    finally:
        for block in blocks:
            model.set_submodule(block.path, block.module)
        for name, weight in before.items():
            model.get_parameter(name).data = weight


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
        rows = {
            f"{block.path}.{parameter}.{expert}": part.contiguous()
            for parameter, parts in fitted.experts.items()
            for expert, part in enumerate(parts)
        }
        shared = {name: weight.contiguous() for name, weight in fitted.shared.items()}
        save_file({**rows, **shared}, self.folder / f"{block.path}.safetensors")

    def rows(self, path: str, parameter: str, expert: int) -> torch.Tensor | None:
        """Kept rows of a parameter of one expert, if it changes."""
        return self._read(f"{path}.{parameter}.{expert}")

    def shared(self, name: str) -> torch.Tensor | None:
        """A parameter that is no routed expert's, if it changes."""
        return self._read(name)

    @property
    def _files(self) -> TensorReader:
        if self._reader is None:
            self._reader = TensorReader(self.folder.glob("*.safetensors"))
        return self._reader

    def _read(self, name: str) -> torch.Tensor | None:
        return self._files.read(name) if name in self._files.tensors else None
