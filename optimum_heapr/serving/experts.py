# Licensed under the Apache License, Version 2.0
"""Experts of many widths in vLLM: vLLM's own experts and kernels, once for each group of pieces.

`RoutedExperts` is where vLLM keeps the weights of a layer's experts and calls its kernels; router, shared experts and
reductions are around it. Every stock model makes its layers of it, so replacing it while a model is built is all that is
needed for any family. What replaces it holds one `RoutedExperts` for each group of [`Pieces`], with vLLM's map of the
experts that are elsewhere, as in expert parallelism, and sums their outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from math import lcm

import torch
from torch import nn
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from .errors import ServingError
from .families import UNIFORM
from .loading import LoadsExperts
from .on_cpu import sum_on_cpu
from .pieces import Pieces, cut
from .quantized import Scheme


# Kernels want widths that are multiples of this: the CPU's pads to it, and the blocks of the others are no narrower.
WIDTH_MULTIPLE = 32


@contextmanager
def variable_widths(widths: dict[int, list[int]], scheme: Scheme | None, all_layers: bool) -> Iterator[None]:
    """While this is open, experts that vLLM makes have the widths of the layer that they belong to.

    Args:
        widths (`dict[int, list[int]]`): by layer, atomic experts of each expert.
        scheme ([`Scheme`], *optional*): how they are quantized, if they are.
        all_layers (`bool`): whether all of them are made here; with pipeline parallelism a process has a part.

    Raises:
        [`ServingError`]: if a layer of the model has no widths, or widths have no layer.
    """
    made: set[int] = set()
    stock_classes = [RoutedExperts, *RoutedExperts.__subclasses__()]
    stock_classes = [stock for stock in stock_classes if not issubclass(stock, _OURS)]
    taken = sorted({stock.__name__ for stock in stock_classes} & set(op_registry_oot))
    if taken:
        raise ServingError(f"another plugin of vLLM replaces {taken[0]}: variable widths cannot; {UNIFORM}")
    for stock in stock_classes:
        given = {"widths_by_layer": widths, "scheme": scheme, "made": made}
        ours = type("Variable" + stock.__name__, (VariableWidths, stock), given)
        op_registry_oot[stock.__name__] = ours
    try:
        yield
    finally:
        for stock in stock_classes:
            del op_registry_oot[stock.__name__]
    if all_layers and made != set(widths):
        missing = sorted(set(widths) - made)
        raise ServingError(f"vLLM's model has no experts in layer {missing[0]}, where the checkpoint has; {UNIFORM}")


class RoutedExpertsGroup(RoutedExperts):
    """The pieces of one width: vLLM's experts, of which this has those in `members`. Quantizers know them by the class's name."""

    def __init__(
        self, layer_name: str, params_dtype: torch.dtype, moe_config: FusedMoEConfig, *args, members, **kwargs
    ):
        self.members = {expert: slot for slot, expert in enumerate(members)}
        super().__init__(layer_name, params_dtype, moe_config, *args, **kwargs)

    def update_expert_map_info(self) -> None:
        slots = [self.members.get(expert, -1) for expert in range(self.moe_config.num_experts)]
        self.local_num_experts = len(self.members)
        self.expert_placement_strategy = "linear"
        self.register_buffer("_expert_map", torch.tensor(slots, dtype=torch.int32), persistent=False)
        self.register_buffer("expert_mask", None, persistent=False)

    def _map_global_expert_id_to_local_expert_id(self, expert_id: int) -> int:
        return self.members.get(expert_id, -1)

    def run(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        self._ensure_moe_quant_config_init()
        return self.quant_method.apply(self, x, topk_weights, topk_ids, None, None)


class GroupsMethod(FusedMoEMethodBase):
    """vLLM's hook for how experts compute: each group by itself, and the sum."""

    def __init__(self, moe: FusedMoEConfig):
        super().__init__(moe)

    def create_weights(self, layer: VariableWidths, *args, **kwargs) -> None:
        layer.make_groups()

    def get_fused_moe_quant_config(self, layer) -> None:
        return None  # each group has its own

    def apply(self, layer: VariableWidths, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
        if not current_platform.is_cpu():
            return _sum_of_groups(layer, x, topk_weights, topk_ids)
        if torch.compiler.is_compiling():
            return torch.ops.heapr.experts(x, topk_weights, topk_ids, layer.layer_name)
        return sum_on_cpu(layer, x, topk_weights, topk_ids)


def _sum_of_groups(layer, x, topk_weights, topk_ids):
    """Every group is given all tokens: its kernel skips the experts that its map calls -1."""
    return sum(group.run(x, topk_weights, topk_ids) for group in layer.groups)


class VariableWidths(LoadsExperts):
    """Mixed into `RoutedExperts`: the experts of a layer, each of a width of its own, as groups of pieces."""

    widths_by_layer: dict[int, list[int]]
    scheme: Scheme | None
    made: set[int]

    def __init__(self, layer_name, params_dtype, moe_config: FusedMoEConfig, quant_config, **options):
        self.layer = extract_layer_index(layer_name)
        self.widths = self.widths_by_layer.get(self.layer)
        if self.widths is None or len(self.widths) != moe_config.num_experts:
            found = "no widths" if self.widths is None else f"widths of {len(self.widths)} experts"
            raise ServingError(f"{layer_name}: {found} in config.json, vLLM makes {moe_config.num_experts}; {UNIFORM}")
        if self.scheme and moe_config.has_bias:
            raise ServingError(f"{layer_name}: experts with biases are not served in {self.scheme}; {UNIFORM}")
        group = self.scheme and self.scheme.group or 1
        multiple = lcm(WIDTH_MULTIPLE, group) * moe_config.moe_parallel_config.tp_size
        self.pieces: Pieces = cut(self.widths, multiple, keep_empty=moe_config.has_bias)
        self._group_options = options
        self.loaded: set[tuple[int, str]] = set()
        self.made.add(self.layer)
        super().__init__(layer_name, params_dtype, moe_config, quant_config, **options)

    def _get_quant_method(self, prefix, quant_config, moe_config) -> FusedMoEMethodBase:
        return GroupsMethod(moe_config)

    def make_groups(self) -> None:
        try:
            self.groups = nn.ModuleList(self._group(*group) for group in enumerate(self.pieces.widths))
            in_int8 = any(parameter.dtype == torch.int8 for parameter in self.groups.parameters())
            if in_int8 and current_platform.is_zen_cpu() and self.params_dtype != torch.bfloat16:
                # vLLM takes zentorch's all the same, and the first request ends in it, of stock models as well.
                raise NotImplementedError("zentorch's takes bfloat16 alone")
        except (ValueError, NotImplementedError) as error:
            if self.scheme is None:
                raise
            raise self.scheme.without_kernel(self.params_dtype, error) from error
        for expert in (expert for expert, width in enumerate(self.widths) if not width):
            for group, _ in self.pieces.starts(expert):  # zeros, whatever is stored of it
                for parameter in self.groups[group].parameters():
                    parameter.data[self.groups[group].members[expert]].zero_()
        maps = torch.stack([group._expert_map for group in self.groups])
        self.register_buffer("slots", maps, persistent=False)  # by group and expert: its place there, or -1

    def _group(self, group: int, width: int) -> RoutedExpertsGroup:
        members = self.pieces.experts_of(group)
        config = self._group_config(width, members)
        options = {"members": members, **self._group_options}
        return RoutedExpertsGroup(self.layer_name, self.params_dtype, config, self.quant_config, **options)

    def _group_config(self, width: int, members: list[int]) -> FusedMoEConfig:
        backend = self.moe_config.moe_backend
        if current_platform.is_cuda_alike() and backend == "auto":
            backend = "triton"  # skips the experts that a map leaves out; not every backend does
        return dataclasses.replace(
            self.moe_config,
            intermediate_size=width,
            intermediate_size_per_partition_unpadded=None,
            num_local_experts=len(members),
            is_lora_enabled=False,  # only linear layers have adapters, so that kernels need not know any
            moe_backend=backend,
        )

    def load_weights(self, weights):
        raise ServingError(f"{self.layer_name}: vLLM hands out weights in a way that is not known; {UNIFORM}")


_OURS = (VariableWidths, RoutedExpertsGroup)


def _zentorch_takes(layer: nn.Module, stock=cpu_moe.is_zentorch_moe_supported) -> bool:
    """Not pieces that are not quantized: where all rows have one expert its kernel ends with an error in float32, and did once in bfloat16."""
    return stock(layer) and not isinstance(layer, RoutedExpertsGroup)


cpu_moe.is_zentorch_moe_supported = _zentorch_takes  # vLLM's own kernel takes its place, as without zentorch
