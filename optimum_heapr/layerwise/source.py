# Licensed under the Apache License, Version 2.0
"""Parameters of a model that is not in memory, made from its safetensors one at a time, or one expert at a time.

transformers' own conversions between the tensors of a checkpoint and the parameters of a model are run for just what is
asked for, so that checkpoints as they are on the Hub, an expert a tensor or all in one, can be read piece by piece.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..experts import EXPERT_PARAMETERS, ExpertBlock, find_expert_blocks, model_name
from ..utils.errors import HeaprError
from ..utils.tensor_files import TensorReader


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform


class SourceCheckpoint:
    """Parameters of the unpruned model, made from its checkpoint when they are asked for.

    Args:
        skeleton (`PreTrainedModel`): the unpruned model without storage, not yet cut.
        files (`Iterable[str]`): its safetensors files.

    Raises:
        HeaprError: if a parameter is made in a way that this module does not follow.
    """

    def __init__(self, skeleton: PreTrainedModel, files: Iterable[str]):
        self.blocks = find_expert_blocks(skeleton)
        self.reader = TensorReader(files)
        self.empty = dict(skeleton.state_dict())
        self.dtypes = {name: tensor.dtype for name, tensor in self.empty.items()}
        self._of_experts = {f"{block.path}.{name}" for block in self.blocks for name in EXPERT_PARAMETERS}
        transforms = getattr(skeleton, "_weight_conversions", None) or []
        self.converters, self.stored = parameters_of(skeleton, self.reader.tensors, transforms)
        for parameter, converter in self.converters.items():
            if len(converter.target_patterns) > 1:
                name = next(iter(self.stored[parameter].values()))[0]
                raise not_streamable(skeleton, f"{name} becomes several parameters")

    def parameter(
        self, name: str, expert: int | None = None, device: torch.device = torch.device("cpu")
    ) -> torch.Tensor:
        """A parameter, or `parameter[expert : expert + 1]` of it, in the dtype that the model is loaded in.

        Args:
            name (`str`): of the parameter.
            expert (`int`, *optional*): which.
            device (`torch.device`): where it goes, and is converted.
        """
        dtype, stored = self.dtypes[name], self.stored[name]
        if name not in self.converters:
            ((key,),) = stored.values()
            return self.reader.read(key, expert).to(device, dtype)
        converter = copy.deepcopy(self.converters[name])
        # What dequantizes takes weights and scales as they are stored.
        stored_dtype = any(hasattr(operation, "hf_quantizer") for operation in converter.operations)
        for pattern, keys in stored.items():
            row = None
            if expert is not None:
                # Either one tensor an expert, or all experts in one.
                one_each = len(self.reader.tensors[keys[0]].shape) < len(self.empty[name].shape)
                keys, row = ([keys[expert]], None) if one_each else (keys, expert)
            for key in keys:
                tensor = self.reader.read(key, row).to(device)
                converter.add_tensor(name, key, pattern, tensor if stored_dtype else tensor.to(dtype))
        shape = self.empty[name].shape if expert is None else (1, *self.empty[name].shape[1:])
        return _only(converter.convert(name, model=StandIn({name: shape}, dtype=dtype))).detach().to(dtype)

    def load(self, name: str, device: torch.device) -> torch.Tensor:
        """A whole parameter in memory of its own; of experts no more than one is held besides."""
        if name not in self._of_experts:
            return self.parameter(name, device=device)
        made = torch.empty(self.empty[name].shape, dtype=self.dtypes[name], device=device)
        for expert in range(made.shape[0]):
            made[expert : expert + 1] = self.parameter(name, expert, device)
        return made

    def read_ahead(self, names: Iterable[str]) -> None:
        """Has the system read what these parameters are made from, as [`TensorReader.read_ahead`]."""
        self.reader.read_ahead(key for name in names for keys in self.stored[name].values() for key in keys)

    def expert(self, block: ExpertBlock, expert: int, parameters: Iterable[str] = ("down_proj",)) -> ExpertBlock:
        """A block that holds one expert of `block` alone, with some of its parameters."""
        flags = {name: getattr(block.module, name) for name in ("has_bias", "is_transposed", "is_concatenated")}
        values = {name: self.parameter(f"{block.path}.{name}", expert) for name in parameters}
        return replace(block, module=SimpleNamespace(**flags, **values), num_experts=1)


def parameters_of(
    model: PreTrainedModel, names: Iterable[str], transforms: Iterable[WeightTransform]
) -> tuple[dict[str, WeightConverter], dict[str, dict[str, list[str]]]]:
    """Which tensors of a checkpoint make which parameter of a model; those that make none are left out, as in loading it.

    Args:
        model (`PreTrainedModel`): with or without storage.
        names (`Iterable[str]`): of the tensors.
        transforms (`Iterable[WeightTransform]`): how transformers makes the one of the others.

    Returns:
        `tuple[dict, dict]`: by parameter, its converter if it has one; by parameter and pattern, the names in the checkpoint,
        of experts in their order.
    """
    transforms, state = list(transforms), model.state_dict()
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    converted: dict[str, WeightConverter] = {}
    stored: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if parameter not in state:
            if name not in state:
                continue
            parameter, pattern = name, None
        if pattern is not None:
            converted[parameter] = by_pattern[pattern]
        stored.setdefault(parameter, {}).setdefault(pattern or name, []).append(name)
    return converted, stored


class StandIn:
    """What conversions ask of a model: the shape and dtype of a parameter, and the widths of experts."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        expert_widths: dict[str, list[int]] | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.shapes, self.dtype = shapes, dtype
        self.config = SimpleNamespace(expert_widths=expert_widths)

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(self.shapes[name], dtype=self.dtype, device="meta")

    def get_submodule(self, path: str) -> SimpleNamespace:
        inside = (name for name in self.shapes if name.rpartition(".")[0] == path)
        return SimpleNamespace(**{name.rpartition(".")[2]: self.get_parameter(name) for name in inside})


def unlisted(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return value[0] if isinstance(value, list) else value


def _only(made: dict) -> torch.Tensor:
    (value,) = made.values()
    return unlisted(value)


def not_streamable(model: PreTrainedModel, reason: str) -> HeaprError:
    return HeaprError(
        f"model={model_name(model)!r}: cannot be read piece by piece: {reason}; calibrate it with memory='plain', and "
        "cut it with HeaprPruner.apply()"
    )
