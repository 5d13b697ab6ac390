# Licensed under the Apache License, Version 2.0
"""Quantized checkpoints: atomic experts are chosen and cut as floating-point weights, so these are refused or converted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import HeaprError


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# What transformers can turn back into floating-point weights, tensor by tensor and on any device.
DEQUANTIZABLE = ("fp8", "mxfp4", "compressed-tensors")
COMPRESSED = (("float", 8, "channel"), ("float", 8, "tensor"), ("int", 4, "group"), ("int", 4, "channel"))
"""Of compressed-tensors: type, bits, and what shares a scale."""


def quantization_of(config: PreTrainedConfig) -> dict[str, Any]:
    """How a configuration says that its weights are quantized, with `quant_method` as text; empty if they are not."""
    # The two places where checkpoints have it: the top, and the part that describes the text model.
    for part in (config, config.get_text_config()):
        if saved := getattr(part, "quantization_config", None):
            saved = saved if isinstance(saved, dict) else saved.to_dict()
            method = saved.get("quant_method")
            return {**saved, "quant_method": str(getattr(method, "value", method))}
    return {}


def check_known(model: str, saved: dict[str, Any]) -> None:
    """Refuses a quantized checkpoint whose method transformers does not know: it would take the numbers as they are stored for weights.

    Args:
        model (`str`): what the user called it.
        saved (`dict`): as of [`quantization_of`].

    Raises:
        HeaprError: naming the method.
    """
    from transformers.quantizers import AutoHfQuantizer

    if saved and not AutoHfQuantizer.supports_quant_method(saved):
        raise HeaprError(
            f"model={model!r}: its weights are quantized ({saved['quant_method']}), which this transformers does not know; install "
            "what registers that method or a newer transformers, or name a checkpoint that is quantized otherwise"
        )


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
    saved = quantization_of(config)
    if not saved:
        return False
    method = saved["quant_method"]
    if method not in DEQUANTIZABLE:
        raise HeaprError(
            f"model={model!r}: its weights are quantized ({method}), which cannot be cut; name the checkpoint in bfloat16 "
            f"that it was made from, or hand over a model that its quantizer dequantized (dequantize is for {', '.join(DEQUANTIZABLE)})"
        )
    if not dequantize:
        raise HeaprError(
            f"model={model!r}: its weights are quantized ({method}), which cannot be cut; pass dequantize=True "
            "to prune it in floating point, or name an unquantized checkpoint"
        )
    if method == "fp8":
        from .fp8 import METHOD as method
    elif method == "compressed-tensors":
        _check_compressed_tensors(model, saved)
    vars(config.get_text_config()).pop("quantization_config", None)
    config.quantization_config = {**saved, "quant_method": method, "dequantize": True}
    return True


def _check_compressed_tensors(model: str, saved: dict[str, Any]) -> None:
    """Refuses what transformers does not dequantize, or not as it was meant, where a layer's experts become one tensor."""
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
    from transformers.utils import is_compressed_tensors_available

    if not is_compressed_tensors_available():
        raise HeaprError(
            f"model={model!r}: its weights are quantized (compressed-tensors), and the package that dequantizes them is not here; "
            "pip install compressed-tensors"
        )
    if not hasattr(CompressedTensorsHfQuantizer, "get_load_operations"):
        raise HeaprError(
            f"model={model!r}: its weights are quantized (compressed-tensors), which this transformers dequantizes only once all "
            "of them are in memory; pip install transformers==5.23.0"
        )
    for group in saved.get("config_groups", {}).values():
        weights = group.get("weights") or {} if isinstance(group, dict) else {}
        kind = tuple(weights.get(key) for key in ("type", "num_bits", "strategy"))
        reordered = weights.get("actorder") not in (None, False, "weight", "static")
        if kind not in COMPRESSED or not weights.get("symmetric") or reordered:
            words = ", ".join(
                f"{key}={weights.get(key)!r}" for key in ("type", "num_bits", "strategy", "symmetric", "actorder")
            )
            raise HeaprError(
                f"model={model!r}: its weights are quantized (compressed-tensors: {words}), which is not dequantized here; name the "
                "checkpoint in bfloat16 that it was made from"
            )


def is_dequantizing(config: PreTrainedConfig) -> bool:
    """Whether [`set_dequantizing`] changed a configuration."""
    saved = getattr(config, "quantization_config", None)
    return isinstance(saved, dict) and bool(saved.get("dequantize"))
