# Licensed under the Apache License, Version 2.0
"""Says when a quantizer leaves packed experts as they are. This file travels with pruned checkpoints."""

import warnings

import torch
from torch import nn

from .atomic_experts import AtomicExperts


def warn_of_unquantized_experts(model: nn.Module) -> None:
    """Warns if a model is quantized and its packed experts are not: quantizers look for linear layers, and most pass over what is none
    without a word.

    Args:
        model (`PreTrainedModel`): as it was loaded.
    """
    quantization = getattr(model.config, "quantization_config", None)
    experts = [module for module in model.modules() if isinstance(module, AtomicExperts)]
    weights = [parameter for module in experts for parameter in module.parameters()]
    if not quantization or not weights or not all(_is_plain(weight) for weight in weights):
        return
    method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
    held, whole = (sum(one.numel() * one.element_size() for one in some) for some in (weights, model.parameters()))
    # Checkpoints keep the biases of all experts together, so that there is no other form of such.
    instead = "" if experts[0].has_bias else '; quantize the model loaded with experts_as="linear"'
    warnings.warn(
        f"quantized by {getattr(method, 'value', method)}, but the routed experts, {held / whole:.0%} of the bytes, are in "
        f"{str(weights[0].dtype).removeprefix('torch.')}: these are packed, not linear layers{instead}",
        stacklevel=3,
    )


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight is stored in floating point of 16 bits or more, and not as what stands for it."""
    return type(weight.data) is torch.Tensor and weight.is_floating_point() and weight.element_size() >= 2
