# Licensed under the Apache License, Version 2.0
"""Between the tensors of a checkpoint, one an expert and projection, and the packed ones of `AtomicExperts`.

Checkpoints of pruned models keep the names of the unpruned family's where those are one tensor an expert; families that
store all experts in one tensor get `experts.{i}.gate_proj.weight` and so on. This file travels with pruned checkpoints.
"""

import re

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from .atomic_experts import storage_order


# What the checkpoint calls the parts of an expert, unless the family has names of its own.
DEFAULT_NAMES = ("gate_proj", "up_proj", "down_proj")


class PackGateUp(ConversionOps):
    """Gate and up rows (or biases) of each expert -> one tensor of all experts."""

    def __init__(self, interleaved: bool = False):
        self.interleaved = interleaved

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        gates, ups = _present(input_dict, source_patterns)
        widths = [gate.shape[0] for gate in gates]
        packed = torch.empty(2 * sum(widths), *gates[0].shape[1:], dtype=gates[0].dtype, device=gates[0].device)
        start = 0
        for expert in storage_order(widths):
            gate, up = gates[expert], ups[expert]
            block = packed[start : start + 2 * gate.shape[0]]
            start += 2 * gate.shape[0]
            gate_rows, up_rows = (block[::2], block[1::2]) if self.interleaved else block.chunk(2)
            if gate.shape[0]:
                gate_rows.copy_(gate)
                up_rows.copy_(up)
            gates[expert] = ups[expert] = None  # the sources are freed as they are copied
        return {target_patterns[0]: packed}

    @property
    def reverse_op(self):
        return UnpackGateUp(self.interleaved)


class UnpackGateUp(ConversionOps):
    """The inverse of `PackGateUp`."""

    def __init__(self, interleaved: bool = False):
        self.interleaved = interleaved

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, model=None, full_layer_name=None, **kwargs):
        widths = _widths(model, full_layer_name)
        order, unpacked = storage_order(widths), {}
        for expert, block in zip(order, _only(input_dict).split([2 * widths[expert] for expert in order])):
            half = block.shape[0] // 2
            gate, up = (block[::2], block[1::2]) if self.interleaved else (block[:half], block[half:])
            unpacked[target_patterns[0].replace("*", str(expert))] = _as_written(gate, model)
            unpacked[target_patterns[1].replace("*", str(expert))] = _as_written(up, model)
        return unpacked

    @property
    def reverse_op(self):
        return PackGateUp(self.interleaved)


class PackDown(ConversionOps):
    """Down projections [d, width] of each expert -> [sum of widths, d]."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (downs,) = _present(input_dict, source_patterns)
        widths = [down.shape[1] for down in downs]
        packed = torch.empty(sum(widths), downs[0].shape[0], dtype=downs[0].dtype, device=downs[0].device)
        start = 0
        for expert in storage_order(widths):
            packed[start : start + widths[expert]].copy_(downs[expert].T)  # several times faster than `cat` of views
            start += widths[expert]
            downs[expert] = None  # the sources are freed as they are copied
        return {target_patterns[0]: packed}

    @property
    def reverse_op(self):
        return UnpackDown()


class UnpackDown(ConversionOps):
    """The inverse of `PackDown`."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, model=None, full_layer_name=None, **kwargs):
        widths = _widths(model, full_layer_name)
        order = storage_order(widths)
        rows = _only(input_dict).split([widths[expert] for expert in order])
        return {target_patterns[0].replace("*", str(e)): _as_written(block.T, model) for e, block in zip(order, rows)}

    @property
    def reverse_op(self):
        return PackDown()


def register_conversions(model_type: str, interleaved: bool, has_bias: bool, is_packed: bool = True) -> None:
    """Registers how checkpoints of a pruned family are read and written. Calling it again changes nothing.

    Args:
        model_type (`str`): `heapr_` + the model type of the unpruned family, whose renamings are kept.
        interleaved (`bool`): whether the family stores gate and up rows in turn.
        has_bias (`bool`): whether its experts have biases.
        is_packed (`bool`): whether the model holds the experts of a layer together, and not as the checkpoint does.
    """
    mapping = get_checkpoint_conversion_mapping(model_type.removeprefix("heapr_")) or []
    kept = [entry for entry in mapping if not (isinstance(entry, WeightConverter) and _is_of_experts(entry))]
    gate, up, down = expert_names(model_type)
    # These are regular expressions in both directions: `\.` keeps `shared_experts` apart, the look-ahead the biases.
    own = [
        WeightConverter(
            [rf"\.experts.*.{gate}.weight", rf"\.experts.*.{up}.weight"],
            r"\.experts.gate_up_proj(?!_bias)",
            [PackGateUp(interleaved)],
        ),
        WeightConverter(rf"\.experts.*.{down}.weight", r"\.experts.down_proj(?!_bias)", [PackDown()]),
    ]
    if has_bias:
        biases = [rf"\.experts.*.{gate}.bias", rf"\.experts.*.{up}.bias"]
        own.append(WeightConverter(biases, r"\.experts.gate_up_proj_bias", [PackGateUp(interleaved)]))
    register_checkpoint_conversion_mapping(model_type, [*kept, *(own if is_packed else [])], overwrite=True)


def expert_names(model_type: str) -> tuple[str, str, str]:
    """What checkpoints of a family call the gate, up and down projections of an expert."""
    names = DEFAULT_NAMES
    for transform in get_checkpoint_conversion_mapping(model_type.removeprefix("heapr_")) or []:
        if isinstance(transform, WeightConverter) and _is_of_experts(transform):
            stored = [match for source in transform.source_patterns if (match := _per_expert_name(source))]
            if len(stored) == 2:
                names = (*stored, names[2])
            elif len(stored) == 1:
                names = (*names[:2], stored[0])
    return names


def _is_of_experts(converter: WeightConverter) -> bool:
    return any(re.search(r"experts\.(gate_up_proj|down_proj)", target) for target in converter.target_patterns)


def _per_expert_name(pattern: str) -> str | None:
    """`w1` for `.experts.*.w1.weight`; `None` for a tensor of all experts."""
    match = re.search(r"experts\.\*\.(\w+)\.weight", pattern)
    return match[1] if match else None


def _present(tensors: dict, patterns: list[str]) -> list[list[torch.Tensor]]:
    """Those of the sources that there are, in their order. A quantizer adds the names of what it stores beside a weight, and takes
    that out, or finds nothing: it quantized other layers alone."""
    found = [tensors[pattern] for pattern in patterns if pattern in tensors]
    return [part if isinstance(part, list) else list(part) for part in found]


def _as_written(part: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """A view, as transformers unpacks a whole model before it writes the first file and makes the tensors of one file at a time
    contiguous; of a model that is offloaded it unpacks one file at a time, and writes what it gets."""
    devices = (getattr(model, "hf_device_map", None) or {}).values()
    return part.contiguous() if {"cpu", "disk"} & set(devices) else part


def _only(tensors: dict) -> torch.Tensor:
    (tensor,) = tensors.values()
    return tensor[0] if isinstance(tensor, list) else tensor


def _widths(model: torch.nn.Module, name: str) -> list[int]:
    """Widths of the expert block that a tensor belongs to.

    Checkpoints may call a block otherwise than the model does, but the numbers of layers are the same.
    """
    widths = model.config.expert_widths
    path = name.rpartition("experts.")[0] + "experts"
    same_layer = [block for block in widths if _layer_numbers(block) == _layer_numbers(path)]
    if path not in widths and len(same_layer) != 1:
        raise KeyError(f"{name}: the configuration has widths for {len(same_layer)} blocks of this layer, not one")
    return widths[path if path in widths else same_layer[0]]


def _layer_numbers(path: str) -> list[str]:
    return re.findall(r"\.(\d+)\.", path)
