# Licensed under the Apache License, Version 2.0
"""FP8 weights with a scale for each block, turned into floating point as transformers does it, where blocks are cut off as well.

transformers (5.17 to 5.23) takes the size of a block from the shapes of a weight and of its scales. Rows that are no multiple of
128, as the 576 of `kv_a_proj_with_mqa` in DeepSeek-V3, it refuses, or takes for blocks of another size. And a weight without scales
it leaves in the dtype of the checkpoint, whatever dtype the model is loaded in.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import WeightConverter
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import FineGrainedFP8Config


METHOD = "fp8_in_floating_point"
"""Name of this way of loading, for configurations in memory; no checkpoint has it."""

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


register_quantization_config(METHOD)(type("Fp8InFloatingPoint", (FineGrainedFP8Config,), {}))


@register_quantizer(METHOD)
class FloatingPointQuantizer(FineGrainedFP8HfQuantizer):
    """Loads what `FineGrainedFP8HfQuantizer` does with `dequantize=True`, with [`DequantizeBlocks`] in place of its operation."""

    def update_weight_conversions(self, *arguments: Any) -> list:
        conversions = super().update_weight_conversions(*arguments)
        for conversion in conversions:
            if isinstance(conversion, WeightConverter):
                conversion.operations = [
                    DequantizeBlocks(self) if type(operation) is Fp8Dequantize else operation
                    for operation in conversion.operations
                ]
        return conversions


class DequantizeBlocks(Fp8Dequantize):
    """`Fp8Dequantize` for blocks of the size that the configuration names, of which the last may be cut off."""

    def convert(
        self, input_dict: dict, full_layer_name: str | None = None, model: Any = None, **options: Any
    ) -> dict[str, Any]:
        """As of transformers; weights that have no scales are turned into the dtype of the parameter."""
        made = super().convert(input_dict, full_layer_name=full_layer_name, model=model, **options)
        kept = [*(getattr(model, f"_keep_in_fp32_modules{kind}", None) or () for kind in ("", "_strict"))]
        if any(part in full_layer_name for parts in kept for part in parts):
            return made
        module, parameter = get_module_from_name(model, full_layer_name)
        dtype = getattr(module, parameter).dtype
        return {name: _turned(value, dtype) for name, value in made.items()}

    def _dequantize_one(self, quantized: torch.Tensor, scales: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sizes, block = quantized.shape[-2:], self.hf_quantizer.quantization_config.weight_block_size
        # Two numbers of four bits in a byte have blocks of their own.
        if block is None or quantized.dtype in (torch.int8, torch.float4_e2m1fn_x2) or scales.numel() == 1:
            return super()._dequantize_one(quantized, scales, *arguments, **options)
        missing = [-size % step for size, step in zip(sizes, block)]
        whole = quantized
        if any(missing):
            whole = torch.nn.functional.pad(quantized.float(), (0, missing[1], 0, missing[0]))
        grid = tuple(size // step for size, step in zip(whole.shape[-2:], block))
        if scales.shape[-2:] != grid:
            raise ValueError(f"{list(sizes)} weights in blocks of {list(block)} have no {list(scales.shape)} scales")
        made = super()._dequantize_one(whole, scales, *arguments, **options)
        return made[..., : sizes[0], : sizes[1]].contiguous()


def _turned(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_turned(part, dtype) for part in value]
    return value.to(dtype) if value.dtype not in _FP8 else value


def dequantized(
    quantizer: FloatingPointQuantizer, weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What a weight in FP8 stands for.

    Args:
        quantizer (`FloatingPointQuantizer`): knows the size of a block.
        weight (`torch.Tensor`): `[rows, columns]`.
        scales (`torch.Tensor`): one for each block, of which the last of a row or column may be cut off.
        dtype (`torch.dtype`): of the result.
    """
    return DequantizeBlocks(quantizer)._dequantize_one(weight, scales, output_dtype=dtype)


def quantized(quantizer: FloatingPointQuantizer, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in FP8 and its scales, by the operation of transformers, such that the largest of a block is the largest of FP8.

    Args:
        quantizer (`FloatingPointQuantizer`): knows the size of a block, and whether scales are powers of two.
        weight (`torch.Tensor`): `[rows, columns]`; blocks that are cut off are filled up with zeros first.
    """
    sizes, block = weight.shape, quantizer.quantization_config.weight_block_size
    missing = [-size % step for size, step in zip(sizes, block)]
    whole = torch.nn.functional.pad(weight, (0, missing[1], 0, missing[0]))
    made = quantizer.get_quantize_ops().convert({"weight": whole})
    return made["weight"][: sizes[0], : sizes[1]].contiguous(), made["weight_scale_inv"]
