# Licensed under the Apache License, Version 2.0
"""Quantized checkpoints: atomic experts are chosen and cut as floating-point weights, so these are refused or converted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import HeaprError


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# What transformers can turn back into floating-point weights on any device.
DEQUANTIZABLE = ("fp8", "mxfp4")


def unquantized_loading(config: PreTrainedConfig, model: str, dequantize: bool) -> dict[str, Any]:
    """Options of `from_pretrained` with which a checkpoint is loaded in floating point.

    Args:
        config (`PreTrainedConfig`): configuration of the checkpoint.
        model (`str`): what the user called it.
        dequantize (`bool`): whether quantized weights are to be converted.

    Raises:
        HeaprError: if the checkpoint is quantized and conversion was not asked for, or is not possible.
    """
    # The two places where checkpoints have it: the top, and the part that describes the text model.
    saved = next(
        (
            found
            for part in (config, config.get_text_config())
            if (found := getattr(part, "quantization_config", None))
        ),
        None,
    )
    if not saved:
        return {}
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
    from transformers.quantizers.auto import AutoQuantizationConfig

    return {"quantization_config": AutoQuantizationConfig.from_dict({**saved, "dequantize": True})}
