# Licensed under the Apache License, Version 2.0
"""Quantized checkpoints: atomic experts are chosen and cut as floating-point weights, so these are refused or converted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import HeaprError


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# What transformers can turn back into floating-point weights on any device.
DEQUANTIZABLE = ("fp8", "mxfp4")


def set_dequantizing(config: PreTrainedConfig, model: str, dequantize: bool) -> bool:
    """Has a configuration say that its checkpoint is loaded in floating point.

    Args:
        config (`PreTrainedConfig`): configuration of the checkpoint; changed if it is quantized.
        model (`str`): what the user called it.
        dequantize (`bool`): whether quantized weights are to be converted.

    Returns:
        `bool`: whether the checkpoint is quantized.

    Raises:
        HeaprError: if the checkpoint is quantized and conversion was not asked for, or is not possible.
    """
    # The two places where checkpoints have it: the top, and the part that describes the text model.
    parts = list({id(part): part for part in (config, config.get_text_config())}.values())
    saved = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    if not saved:
        return False
    saved = saved if isinstance(saved, dict) else saved.to_dict()
    method = str(getattr(saved.get("quant_method"), "value", saved.get("quant_method")))
    if method not in DEQUANTIZABLE:
        raise HeaprError(
            f"model={model!r}: its weights are quantized ({method}), which cannot be cut; name the checkpoint in bfloat16 "
            f"that it was made from (dequantize is for {' and '.join(DEQUANTIZABLE)})"
        )
    if not dequantize:
        raise HeaprError(
            f"model={model!r}: its weights are quantized ({method}), which cannot be cut; pass dequantize=True "
            "to prune it in floating point, or name an unquantized checkpoint"
        )
    if method == "fp8":
        from .fp8 import METHOD as method
    for part in parts[1:]:
        vars(part).pop("quantization_config", None)
    config.quantization_config = {**saved, "quant_method": method, "dequantize": True}
    return True


def is_dequantizing(config: PreTrainedConfig) -> bool:
    """Whether [`set_dequantizing`] changed a configuration."""
    saved = getattr(config, "quantization_config", None)
    return isinstance(saved, dict) and bool(saved.get("dequantize"))
