# Licensed under the Apache License, Version 2.0
"""Experts of a pruned model as ordinary linear layers, for tools that know nothing else, and back."""

from __future__ import annotations

from torch import nn

from ..experts import model_name
from ..modeling.atomic_experts import AtomicExperts
from ..modeling.conversion import expert_names
from ..modeling.linear_experts import LinearExperts
from ..utils.errors import HeaprError


def linear_expert_layers(model: nn.Module) -> dict[str, list[str]]:
    """Paths of the linear layers of routed experts, without those of width 0, by path of their block; empty for other models."""
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, LinearExperts)}
    return {
        path: [
            f"{path}.{name}"
            for name, layer in block.named_modules()
            if isinstance(layer, nn.Linear) and layer.weight.numel()
        ]
        for path, block in blocks.items()
    }


def to_linear_experts(model: nn.Module) -> nn.Module:
    """Makes the experts of a pruned model ordinary linear layers, in place: `…experts.3.gate_proj` and so on.

    Quantizers and adapters that look for `nn.Linear` then find them. Of the weights only down projections are copied, a layer at
    a time; the model computes the same, expert after expert, and saves under the same names. Its configuration says
    `experts_as="linear"`, so that what is saved loads in this form again; `from_pretrained(folder, experts_as="linear")` loads any
    pruned checkpoint so, and a `quantization_config` given there then reaches the experts.

    Args:
        model (`PreTrainedModel`): a pruned model of layout `variable`.

    Returns:
        `PreTrainedModel`: the same object.

    Raises:
        HeaprError: if there are no packed experts, or they have biases.
    """
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, AtomicExperts)}
    if not blocks:
        raise HeaprError(
            f"model={model_name(model)!r}: has no experts of variable widths; prune with layout='variable', or load what was"
        )
    for path, block in blocks.items():
        if block.has_bias:
            raise HeaprError(
                f"model={model_name(model)!r}: {path} has biases, which checkpoints keep for all experts together; such experts "
                "stay packed"
            )
    for path, block in blocks.items():
        model.set_submodule(path, LinearExperts(block, expert_names(model.config.model_type)))
    model.config.experts_as = "linear"
    return model


def from_linear_experts(model: nn.Module) -> nn.Module:
    """The inverse of [`to_linear_experts`], in place, a layer at a time.

    Raises:
        HeaprError: if a layer was quantized or carries an adapter.
    """
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, LinearExperts)}
    for layer in (layer for block in blocks.values() for expert in block.layers() for layer in expert):
        if type(layer) is not nn.Linear:
            raise HeaprError(
                f"experts: hold a {type(layer).__name__}, which cannot be packed; merge adapters first, and take quantized ones "
                "to floating point, by model.dequantize() where transformers has that, before"
            )
    for path, block in blocks.items():
        model.set_submodule(path, block.to_packed())
    model.config.experts_as = "packed"
    return model
