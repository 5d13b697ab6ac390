# Licensed under the Apache License, Version 2.0
"""What lets the fitting and training of blocks be killed at any moment and go on later: the blocks that are done, in files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.state import differences
from ..fingerprint import hash_of_samples
from ..utils.artefacts import read_artefact, write_artefact
from ..utils.errors import HeaprError, reason_of
from ..utils.logging import say_once
from .fitted import FittedBlock
from .selection import shape_of_rows


if TYPE_CHECKING:
    from ..configuration import HeaprConfig
    from ..experts import ExpertBlock
    from ..planning.plan import PruningPlan
    from ..text.samples import CalibrationData


FORMAT = "heapr_fit"

_ENDING = ".fit.safetensors"


class FitFiles:
    """A folder of blocks that were fitted, of one plan on one text.

    Args:
        folder (`Path`): is made if need be.
        plan (`PruningPlan`): `compensation` and `reconstruction` of it are kept with the blocks.
        data (`CalibrationData`): what they are fitted on.
        dtype (`torch.dtype`): of the model.

    Raises:
        HeaprError: if there can be no such folder.
    """

    def __init__(self, folder: Path, plan: PruningPlan, data: CalibrationData, dtype: torch.dtype):
        self.folder, self.plan = folder, plan
        self._run = description_of_fits(plan, data, dtype)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HeaprError(
                f"fits={str(folder)!r}: cannot be made a folder ({reason_of(error)}); name another place"
            ) from error

    def has(self, block: ExpertBlock) -> bool:
        """Whether this block is done."""
        return self._file_of(block).is_file()

    def read(self, block: ExpertBlock, model: torch.nn.Module) -> FittedBlock:
        """What a block became, on the device of its weights; the plan gets what was said of it.

        Args:
            block (`ExpertBlock`): experts of the unpruned model.
            model (`PreTrainedModel`): that they are of; shapes of shared experts are read.

        Raises:
            HeaprError: if the file is damaged, or of a run that differs.
        """
        tensors, document = read_artefact(self._file_of(block), FORMAT)
        try:
            found = differences(document["run"], self._run)
            fitted = None if found else unpacked(self.plan, block, tensors, document)
            if fitted is not None:
                _check_shapes(fitted, block, self.plan.kept[block.path], model)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise HeaprError(
                f"fits={str(self.folder)!r}: is damaged ({reason_of(error)}); delete the folder to begin anew"
            ) from error
        if fitted is None:
            raise HeaprError(
                f"fits={str(self.folder)!r}: saved by a run that differs ({'; '.join(found)}); go on with the same plan, text and "
                "options, or delete the folder to begin anew"
            )
        return fitted

    def write(self, block: ExpertBlock, fitted: FittedBlock) -> None:
        """Keeps what a block became, whole or not at all."""
        tensors, document = packed(self.plan, block, fitted)
        write_artefact(self._file_of(block), FORMAT, tensors, {"run": self._run, **document})

    def _file_of(self, block: ExpertBlock) -> Path:
        return self.folder / f"{block.path}{_ENDING}"


def _check_shapes(fitted: FittedBlock, block: ExpertBlock, kept: list[torch.Tensor], model: torch.nn.Module) -> None:
    """Refuses what would not go into the block, or by broadcasting would.

    Raises:
        ValueError: naming both shapes.
        LookupError or AttributeError: if the model has no such parameter.
    """
    expected = [
        (f"{name} of expert {expert}", rows, shape_of_rows(block, name, len(indices)))
        for name, parts in fitted.experts.items()
        for expert, (rows, indices) in enumerate(zip(parts, kept, strict=True))
    ]
    expected += [(name, part, tuple(model.get_parameter(name).shape)) for name, part in fitted.shared.items()]
    for name, part, shape in expected:
        if tuple(part.shape) != shape:
            raise ValueError(f"{name} has shape {list(part.shape)} and must have {list(shape)}")


def packed(
    plan: PruningPlan, block: ExpertBlock, fitted: FittedBlock
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a block became and what the plan says of it: tensors by name, and the rest, plain JSON types."""
    tensors = {f"{name}.{e}": part for name, parts in fitted.experts.items() for e, part in enumerate(parts)}
    tensors |= {f"shared.{name}": weight for name, weight in fitted.shared.items()}
    document = {
        "rows": list(fitted.experts),
        "shared": list(fitted.shared),
        "errors": [fitted.error_before, fitted.error_after],
        "compensation": plan.compensation[block.path],
        "reconstruction": plan.reconstruction.get(block.path),
    }
    return tensors, document


def unpacked(
    plan: PruningPlan, block: ExpertBlock, tensors: dict[str, torch.Tensor], document: dict[str, Any]
) -> FittedBlock:
    """The inverse of [`packed`]: the block on the device of its weights, and the plan says of it what that one said."""
    rows = {
        name: [tensors[f"{name}.{e}"].to(block.device) for e in range(block.num_experts)] for name in document["rows"]
    }
    shared = {name: tensors[f"shared.{name}"].to(block.device) for name in document["shared"]}
    fitted = FittedBlock(rows.pop("down_proj"), shared, *document["errors"], trained=rows)
    compensation, reconstruction = [tuple(pair) for pair in document["compensation"]], document["reconstruction"]
    plan.compensation[block.path] = compensation
    plan.reconstruction |= {block.path: reconstruction} if reconstruction else {}
    return fitted


def remove_fits(folder: str | os.PathLike) -> None:
    """Deletes the folder, once what was made of it is safe; files that no run wrote stay, and the folder with them."""
    folder = Path(folder)
    for file in folder.glob(f"*{_ENDING}"):
        file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def say_unused_fits(config: HeaprConfig, path: str | os.PathLike | None) -> None:
    """Warns where a folder for fitted blocks was named and no block is fitted."""
    if path is not None and not config.compensates_blocks:
        say_once(f"fits_path={os.fspath(path)!r}: has no use, as the plan does not compensate over blocks")


def description_of_fits(plan: PruningPlan, data: CalibrationData, dtype: torch.dtype) -> dict[str, Any]:
    """What a fit depends on, plain JSON types."""
    config = plan.config
    kept = (
        f"{path}.{expert}:{indices.tolist()}".encode()
        for path, experts in plan.kept.items()
        for expert, indices in enumerate(experts)
    )
    names = ("ridge", "reconstruction_steps", "reconstruction_learning_rate", "seed", "batch_size")
    described = {
        "model": {**plan.model, "dtype": str(dtype)},
        "kept": hash_of_samples(kept),
        "dropped": plan.dropped,
        "data": {key: value for key, value in data.fingerprint.items() if "source" not in key},
        **{name: getattr(config, name) for name in names},
        # Earlier versions trained on what comes in in the pruned model alone.
        **({"trained_in": "both models"} if config.reconstruction_steps else {}),
    }
    return json.loads(json.dumps(described))
