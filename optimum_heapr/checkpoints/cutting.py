# Licensed under the Apache License, Version 2.0
"""Cuts a checkpoint file by file, without ever holding the model: one expert is in memory at a time.

The model exists without storage only, on the meta device; it is cut like any other and says which tensors the result
has, of which shape, in which file. transformers' own conversions between checkpoints and parameters are then run for
one expert after another: read its tensors, convert, cut, convert back, write. The files are those that cutting in memory
and `save_pretrained` give, byte for byte; with compensation, up to the rounding of sums.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..calibration.processes import connected_processes
from ..fingerprint import check_same_model, model_fingerprint
from ..layerwise.layers import StreamedModel
from ..layerwise.source import SourceCheckpoint, StandIn, not_streamable, unlisted
from ..surgery.apply import check_compensation, compensate_block, cut_model
from ..surgery.fitted import FittedFiles
from ..surgery.layer_by_layer import compensate_together
from ..surgery.selection import packed_rows, padded_expert, set_rows
from ..utils.errors import HeaprError
from ..utils.logging import progress
from ..utils.placement import default_device
from ..utils.tensor_files import write_tensors
from .orientation import check_orientation, written_as_stored


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.statistics import AtomicStatistics
    from ..experts import ExpertBlock
    from ..planning.plan import PruningPlan
    from ..surgery.stock import StockLayout
    from ..text.samples import CalibrationData


_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_UNITS_KEPT = 4  # a parameter of an expert becomes up to two tensors, which are written one soon after the other


def stream_plan(
    skeleton: PreTrainedModel,
    files: Iterable[str],
    plan: PruningPlan,
    folder: Path,
    max_shard_size: int | str = "5GB",
    statistics: AtomicStatistics | None = None,
    fitted: FittedFiles | None = None,
) -> None:
    """Writes the pruned model of a plan into `folder`: weights, index, configurations and code.

    Args:
        skeleton (`PreTrainedModel`): the unpruned model, from [`~optimum_heapr.checkpoints.skeleton.load_skeleton`]; it is cut in place.
        files (`Iterable[str]`): its safetensors files.
        plan (`PruningPlan`): what stays; `compensation` within experts is filled in where it asks for it.
        folder (`Path`): an empty folder.
        max_shard_size (`int` or `str`): largest weight file, as for `save_pretrained`.
        statistics (`AtomicStatistics`, *optional*): second-order ones, needed to compensate within experts.
        fitted (`FittedFiles`, *optional*): what [`fit_streaming`] gave; needed to compensate over blocks.

    Raises:
        HeaprError: if the plan was made for another model, the checkpoint cannot be cut file by file, or what it takes to
            compensate is missing.
    """
    source = _source_of_plan(skeleton, files, plan)
    if not plan.config.compensates_blocks:
        check_compensation(plan, statistics, None)
        plan.forget_fits()
    elif fitted is None:
        raise HeaprError(
            "plan: asks for compensation_scope='block' and fitted=None; pass what checkpoints.cutting.fit_streaming gives"
        )
    layout = cut_model(skeleton, plan, source.blocks)
    target = TargetCheckpoint(skeleton, source, plan, layout, statistics, fitted)
    _write(skeleton, target, folder, max_shard_size)


def fit_streaming(
    skeleton: PreTrainedModel,
    files: Iterable[str],
    plan: PruningPlan,
    data: CalibrationData,
    work: Path,
    activation_memory: int | None = None,
    fits_path: Path | None = None,
) -> FittedFiles:
    """What the blocks become that a plan compensates over or trains, one layer of the checkpoint at a time.

    All processes that are connected share this; then it is to be called on each, and the first has what comes of it.

    Args:
        skeleton, files: as of [`stream_plan`]; the skeleton stays as it is.
        plan (`PruningPlan`): what stays; `compensation` and `reconstruction` are filled in.
        data (`CalibrationData`): the text.
        work (`Path`): an empty folder, which is to outlast the result.
        activation_memory, fits_path: as of [`~optimum_heapr.surgery.layer_by_layer.compensate_together`].

    Raises:
        HeaprError: if the plan was made for another model, or the checkpoint cannot be read layer by layer.
    """
    source, accelerator = _source_of_plan(skeleton, files, plan), connected_processes()
    fitted = FittedFiles(work / "fitted")
    keep = fitted.keep if accelerator is None or accelerator.is_main_process else lambda block, fitted: None
    layers = StreamedModel(skeleton, source, default_device())
    compensate_together(layers, data, plan, work, keep, activation_memory, fits_path, accelerator)
    return fitted


def _source_of_plan(skeleton: PreTrainedModel, files: Iterable[str], plan: PruningPlan) -> SourceCheckpoint:
    """The checkpoint, if it is of the model that the plan was made for."""
    source = SourceCheckpoint(skeleton, files)
    plan.check_shapes({block.path: (block.num_experts, block.width) for block in source.blocks})
    first_experts = [source.expert(block, 0) for block in source.blocks]
    check_same_model(plan.model, model_fingerprint(skeleton, first_experts), "plan")
    check_orientation(skeleton, source.blocks, plan)
    return source


def _write(skeleton: PreTrainedModel, target: TargetCheckpoint, folder: Path, max_shard_size: int | str) -> None:
    """The files of [`stream_plan`]."""
    skeleton.save_pretrained(folder, state_dict={})  # everything but weights
    split = target.split(max_shard_size)
    for file, names in progress(split.filename_to_tensors.items(), desc="Writing", unit="file"):
        tensors = {name: (target.tensors[name].dtype, tuple(target.tensors[name].shape)) for name in names}
        write_tensors(folder / file, tensors, target.parts, {"format": "pt"})
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": skeleton.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


class TargetCheckpoint:
    """Tensors of the pruned model's checkpoint: what there is, and how each is made.

    Args:
        skeleton (`PreTrainedModel`): the pruned model without storage.
        source (`SourceCheckpoint`): what it is made from.
        plan (`PruningPlan`): what stays.
        layout (`StockLayout`, *optional*): how the original architecture holds that; `None` for variable widths.
        statistics (`AtomicStatistics`, *optional*): what compensation within experts needs.
        fitted (`FittedFiles`, *optional*): what compensation over blocks gave.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): by name, without storage, in the order of `save_pretrained`.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        source: SourceCheckpoint,
        plan: PruningPlan,
        layout: StockLayout | None,
        statistics: AtomicStatistics | None = None,
        fitted: FittedFiles | None = None,
    ):
        self.source, self.plan, self.layout, self.statistics, self.fitted = source, plan, layout, statistics, fitted
        self.routed = plan.routed
        self.blocks = {f"{block.path}.{name}": (block, name) for block in source.blocks for name in _PARAMETERS}
        state = skeleton.state_dict()
        for name in skeleton._keys_to_ignore_on_save or ():
            state.pop(name, None)
        self.state = remove_tied_weights_from_state_dict(state, skeleton)
        conversions = written_as_stored(skeleton)
        self.tensors = revert_weight_conversion(skeleton, dict(self.state))
        reverse = [entry.reverse_transform() for entry in conversions[::-1] if not isinstance(entry, PrefixChange)]
        self._renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
        self._units: dict[tuple[str, int | None], dict[str, torch.Tensor]] = {}
        self._origin = self._find_origins(skeleton)

    def split(self, max_shard_size: int | str):
        """Which tensor goes into which file: as in `save_pretrained`, tensors that share storage stay together."""
        return split_state_dict_into_shards_factory(
            self.tensors,
            get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
            get_storage_id=_storage_id,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor of this name, in parts: one an expert where all experts are stored in one."""
        parameter, experts = self._origin[name]
        for expert in experts:
            yield self._unit(parameter, expert, name)

    def _find_origins(self, skeleton: PreTrainedModel) -> dict[str, tuple[str, list[int | None]]]:
        """By name of a tensor: the parameter it is made from, and of which experts of the pruned model."""
        origins: dict[str, tuple[str, list[int | None]]] = {}
        for parameter, tensor in self.state.items():
            if parameter not in self.source.stored:
                raise not_streamable(skeleton, f"the checkpoint has no {parameter}")
            model = StandIn({parameter: tensor.shape}, getattr(skeleton.config, "expert_widths", None))
            for name in self._revert(parameter, tensor, model):
                index = _EXPERT.search(name)
                if parameter not in self.blocks:
                    origins[name] = (parameter, [None])
                elif index:
                    origins[name] = (parameter, [int(index[0])])
                else:
                    origins[name] = (parameter, list(range(len(self.routed[self.blocks[parameter][0].path]))))
        if set(origins) != set(self.tensors):
            different = sorted(set(origins) ^ set(self.tensors))[0]
            raise not_streamable(skeleton, f"{different} is made of several parameters")
        return origins

    def _unit(self, parameter: str, expert: int | None, name: str) -> torch.Tensor:
        """Makes what one parameter of one expert becomes, and keeps the rest of it for the calls to come."""
        unit = self._units.pop((parameter, expert), None) or self._make(parameter, expert)
        tensor = unit.pop(name)
        if unit:
            self._units[parameter, expert] = unit
            while len(self._units) > _UNITS_KEPT:
                self._units.pop(next(iter(self._units)))
        return tensor

    def _make(self, parameter: str, expert: int | None) -> dict[str, torch.Tensor]:
        if expert is None:
            tensor = self.fitted.shared(parameter) if self.fitted else None
            if tensor is None:
                tensor = self.source.parameter(parameter)
            if self.layout is not None:
                tensor = self.layout.resized(parameter, tensor, self.plan)
            return self._revert(parameter, tensor, StandIn({parameter: tensor.shape}))
        block, name = self.blocks[parameter]
        number, expert = expert, self.routed[block.path][expert]  # in the pruned model, and in the unpruned one
        alone = self.source.expert(block, expert, [name])
        kept = self.plan.kept[block.path][expert]
        rows = self.fitted.rows(block.path, name, expert) if self.fitted else None
        compensates = name == "down_proj" and self.plan.config.compensates_experts
        if rows is not None or compensates:
            setattr(alone.module, name, getattr(alone.module, name).clone())  # it may be the checkpoint itself
        if rows is not None:
            set_rows(alone, [kept], [rows], name)
        elif compensates:
            self._compensate(alone, expert, kept)
        if self.layout is None:
            tensor = packed_rows(alone, name, 0, kept)
        else:
            tensor = padded_expert(alone, name, 0, kept, self.layout.width).unsqueeze(0)
        made = self._revert(parameter, tensor, StandIn({parameter: tensor.shape}, {block.path: [len(kept)]}))
        return {_EXPERT.sub(str(number), key): value for key, value in made.items()}

    def _compensate(self, alone: ExpertBlock, expert: int, kept: torch.Tensor) -> None:
        statistics = self.statistics.blocks[alone.path].of_experts([expert])
        (errors,) = compensate_block(alone, [kept], statistics, self.plan.config.ridge)
        report = self.plan.compensation.setdefault(alone.path, [(0.0, 0.0)] * len(self.plan.kept[alone.path]))
        report[expert] = errors

    def _revert(self, parameter: str, tensor: torch.Tensor, model: StandIn) -> dict[str, torch.Tensor]:
        """`revert_weight_conversion` for one parameter, or for one expert of it."""
        key, pattern = rename_source_key(parameter, [], self._converters)
        if pattern is None:
            return {self._renamed(parameter): tensor}
        converter = copy.deepcopy(next(entry for entry in self._converters if pattern in entry.source_patterns))
        converter.add_tensor(key, parameter, pattern, tensor)
        made = converter.convert(key, model=model, config=model.config)
        return {self._renamed(name): unlisted(value) for name, value in made.items()}

    def _renamed(self, name: str) -> str:
        return rename_source_key(name, self._renamings, [])[0]


_PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


def _storage_id(tensor: torch.Tensor) -> tuple[int, int]:
    """What tells storages apart; all empty ones are the same, as they are at no address."""
    storage = tensor.untyped_storage()
    return (storage._cdata if storage.nbytes() else 0, storage.nbytes())
