# Licensed under the Apache License, Version 2.0
"""Quantized experts: which schemes are served, as llm-compressor stores them, and what one column of a stored tensor stands for."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ServingError
from .families import UNIFORM


SERVED = "INT8 with a scale for each row (W8A8), or symmetric INT4 with one for each group of columns (W4A16)"
# What permutes columns, so that an expert's are not in the order of its atomic experts.
_PERMUTES = ("group", "dynamic")


@dataclass(frozen=True)
class Scheme:
    """How the weights of experts are stored.

    Attributes:
        bits (`int`): of a weight, 8 or 4; those of 4 are packed into 32-bit integers along the columns.
        group (`int`, *optional*): columns that share a scale; those of a whole row if not given.
    """

    bits: int
    group: int | None

    def columns_of(self, kind: str) -> int | None:
        """Columns of a weight that one column of its tensor `kind` holds or scales: all of them if `None`."""
        return {"weight_packed": 32 // self.bits, "weight_scale": self.group}.get(kind, 1)

    def __str__(self) -> str:
        return f"INT{self.bits}" + (f" in groups of {self.group}" if self.group else "")


def scheme_of(model_config) -> Scheme | None:
    """How the experts of a checkpoint are quantized, by its `config.json` and by vLLM's flags; `None` if they are not.

    Args:
        model_config (`vllm.config.ModelConfig`): of the engine that is about to start.

    Raises:
        [`ServingError`]: for a scheme that is not served with variable widths.
    """
    settings = getattr(model_config.hf_config, "quantization_config", None) or {}
    method = model_config.quantization or settings.get("quant_method")
    if method is None:
        return None
    schemes = {_scheme(group) for group in settings.get("config_groups", {}).values()}
    if method != "compressed-tensors" or len(schemes) != 1 or None in schemes:
        raise ServingError(
            f"variable widths are not served with quantization ({method}) other than {SERVED}: leave it out, or {UNIFORM}"
        )
    return schemes.pop()


def _scheme(group: dict) -> Scheme | None:
    weights, activations = group.get("weights") or {}, group.get("input_activations") or {}
    kind = tuple(weights.get(name) for name in ("type", "num_bits", "strategy", "symmetric"))
    if kind == ("int", 8, "channel", True) and (activations.get("type"), activations.get("num_bits")) == ("int", 8):
        return Scheme(8, None)
    if kind == ("int", 4, "group", True) and not activations and weights.get("actorder") not in _PERMUTES:
        return Scheme(4, weights["group_size"])
    return None
