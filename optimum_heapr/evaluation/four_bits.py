# Licensed under the Apache License, Version 2.0
"""Layers in 4 bits of bitsandbytes, whose kernel for some CPUs stops at shapes of many pruned experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..utils.logging import say_once


if TYPE_CHECKING:
    from torch import nn


_SWITCH = "support_avx512bf16_for_cpu"  # of a layer: on where the CPU has AVX512-BF16
_ROWS = 32


@contextmanager
def layers_of_any_shape(model: nn.Module) -> Iterator[None]:
    """Until the block ends, layers in 4 bits on a CPU go without the kernel for AVX512-BF16 if it would stop at their shape.

    It takes rows in 32s and whole blocks of columns: `findings/bitsandbytes_shapes_on_some_cpus.sh`.
    """
    stopped = [layer for layer in model.modules() if getattr(layer, _SWITCH, False) and _is_refused(layer)]
    if stopped:
        say_once(
            f"model: {len(stopped)} layers in 4 bits have shapes that the kernel of bitsandbytes for this CPU does not take (rows in "
            "32s and columns in 64s), and are computed without it, slower; prune with width_multiple=64 for it"
        )
    for layer in stopped:
        setattr(layer, _SWITCH, False)
    try:
        yield
    finally:
        for layer in stopped:
            setattr(layer, _SWITCH, True)


def _is_refused(layer: nn.Module) -> bool:
    on_cpu = layer.weight.device.type == "cpu"
    return on_cpu and bool(layer.out_features % _ROWS or layer.in_features % layer.weight.blocksize)
