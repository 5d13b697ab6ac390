# Licensed under the Apache License, Version 2.0
"""Quantized experts: which schemes are served, as llm-compressor stores them, and what one column of a stored tensor stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import ServingError
from .families import UNIFORM


SERVED = "INT8 with a scale for each row (W8A8), or symmetric INT4 with one for each group of columns (W4A16)"
# Values of `actorder` that leave columns in their places, those of an expert in the order of its atomic experts.
_KEEPS_ORDER = (None, False, "static", "weight")
_DAMAGED = "the checkpoint is damaged: copy it again, or quantize it again"


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

    def without_kernel(self, dtype: Any, error: Exception) -> ServingError:
        """What to do where vLLM has no kernel for these experts and activations, in the words of what vLLM 0.32 has."""
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
        cpus = "of AMD with zentorch" + (" and without VLLM_CPU_INT4_W4A8=0" if self.bits == 4 else "")
        cpus = cpus if self.group == 32 else f"with AMX or {cpus}"  # that for AMX has other groups alone
        return ServingError(
            f"vLLM has no kernel here for experts in {self} and {dtype} ({reason}): serve them in bfloat16 (--dtype bfloat16) on a "
            f"GPU or on a CPU {cpus}, or leave them unquantized"
        )

    def __str__(self) -> str:
        return f"INT{self.bits}" + (f" in groups of {self.group}" if self.group else "")


def scheme_of(model_config) -> Scheme | None:
    """How the experts of a checkpoint are quantized, by its `config.json` and by vLLM's flags; `None` if they are not.

    Args:
        model_config (`vllm.config.ModelConfig`): of the engine that is about to start.

    Raises:
        [`ServingError`]: for a scheme that is not served with variable widths, or settings that are none.
    """
    name = "quantization_config"
    settings = _mapping(getattr(model_config.hf_config, name, None), name)
    method = model_config.quantization or settings.get("quant_method")
    if method is None:
        return None
    groups = _mapping(settings.get("config_groups"), f"{name}.config_groups")
    schemes = {_scheme(_mapping(group, f"{name}.config_groups.{key}")) for key, group in groups.items()}
    if method != "compressed-tensors" or len(schemes) != 1 or None in schemes:
        raise ServingError(
            f"variable widths are not served with quantization ({method}) other than {SERVED}: leave it out, or {UNIFORM}"
        )
    return schemes.pop()


def _scheme(group: dict) -> Scheme | None:
    weights, activations = (_mapping(group.get(name), name) for name in ("weights", "input_activations"))
    kind, of_activations = (
        tuple(found.get(name) for name in ("type", "num_bits", "strategy", "symmetric"))
        for found in (weights, activations)
    )
    if (
        kind == ("int", 8, "channel", True)
        and of_activations == ("int", 8, "token", True)
        and activations.get("dynamic")
    ):
        return Scheme(8, None)
    if kind == ("int", 4, "group", True) and not activations and weights.get("actorder") in _KEEPS_ORDER:
        columns = weights.get("group_size")
        if type(columns) is not int or columns < 1:
            raise ServingError(f"group_size in config.json is {columns!r}, and not a number of columns; {_DAMAGED}")
        return Scheme(4, columns)
    return None


def _mapping(value: Any, name: str) -> dict:
    """What stands in `config.json` under a name; empty if nothing does."""
    if value is not None and not isinstance(value, dict):
        raise ServingError(f"{name} in config.json is {str(value)[:60]!r}, and not a mapping; {_DAMAGED}")
    return value or {}
