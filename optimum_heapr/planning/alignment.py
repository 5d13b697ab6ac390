# Licensed under the Apache License, Version 2.0
"""Widths that runtimes can use: which multiple an engine asks for, and what to do when a ratio gives none.

| `align_for` | multiple | because |
|---|---|---|
| `vllm` | 32 | kernels for CPUs compute 32 columns at a time, and our plugin cuts experts into pieces of them; those for GPUs ask for none |
| `gguf` | 256 | K-quants of llama.cpp store super-blocks of 256 weights; other multiples of 32 get larger types, the rest float16 |
| `fp8` | 128 | block-scaled FP8 checkpoints hold one scale for 128 x 128 weights |
| `quantization` | 128 | quantizers share a scale among 32, 64 or 128 columns of a down projection, one for each atomic expert |

Each multiple is that of one rank: `tensor_parallel` N multiplies it by N. Without a preset, stock layouts use
multiples of 8, because `grouped_mm` of transformers wants rows of 16 bytes in bfloat16.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..utils.errors import HeaprError
from ..utils.logging import get_logger
from .errors import UnreachableRatio


if TYPE_CHECKING:
    from ..configuration import HeaprConfig


logger = get_logger(__name__)

PRESETS = {"none": 1, "vllm": 32, "gguf": 256, "fp8": 128, "quantization": 128}
GROUPS = (32, 64, 128)
"""Columns that share a scale, as quantizers are mostly set."""
STOCK_MULTIPLE = 8  # elements in 16 bytes of bfloat16


def is_aligned_for_runtime(config: HeaprConfig) -> bool:
    """Whether a runtime's rule was asked for, so that a width which breaks it is refused and not rounded."""
    return config.align_for != "none" or config.tensor_parallel > 1


def effective_multiple(config: HeaprConfig, widths: list[int]) -> int:
    """What kept widths are multiples of: the least that satisfies `width_multiple`, the preset and the layout.

    Args:
        config (`HeaprConfig`): `width_multiple`, `align_for`, `tensor_parallel` and `layout` are used.
        widths (`list[int]`): atomic experts of one expert in each block of the unpruned model.

    Raises:
        HeaprError: if no expert is wide enough for it.
    """
    multiple = PRESETS[config.align_for]
    # A model whose own widths break the rule of `grouped_mm` does not run with it anyway.
    if config.layout != "variable" and all(width % STOCK_MULTIPLE == 0 for width in widths):
        multiple = math.lcm(multiple, STOCK_MULTIPLE)
    multiple = math.lcm(multiple * config.tensor_parallel, config.width_multiple)
    if is_aligned_for_runtime(config) and multiple > min(widths):
        raise HeaprError(
            f"{_asked(config)}: asks for multiples of {multiple}, experts of this model have {min(widths)} atomic experts; "
            f"{_ask_for_less(config)}"
        )
    return multiple


def uniform_width(config: HeaprConfig, width: int, share: float = 1.0) -> int:
    """The one width of all experts that comes nearest to the ratio, before it is rounded to a multiple.

    Args:
        config (`HeaprConfig`): what was asked for.
        width (`int`): atomic experts of one expert of the unpruned model.
        share (`float`): of the experts that stay in the router.

    Raises:
        HeaprError: if a runtime's rule was asked for that the width breaks, naming the nearest ratios that keep it.
    """
    multiple = effective_multiple(config, [width])
    kept = round((1 - config.ratio) * width / share)
    if not is_aligned_for_runtime(config) or (kept and kept % multiple == 0):
        return kept
    below = kept // multiple * multiple
    nearest = [candidate for candidate in (below, below + multiple) if 0 < candidate < width]
    hint = " or ".join(f"{candidate} ({1 - share * candidate / width:.3f})" for candidate in nearest)
    raise UnreachableRatio(
        f"ratio={config.ratio} gives width {kept}, not a multiple of {multiple} ({_asked(config)}); "
        + (f"nearest: {hint}" if hint else f"there is none below the width {width}; {_ask_for_less(config)}"),
        *(1 - share * candidate / width for candidate in nearest),
    )


def _asked(config: HeaprConfig) -> str:
    """The options of a runtime's rule, as they were given."""
    given = {"align_for": "none", "tensor_parallel": 1}
    return ", ".join(f"{name}={value!r}" for name in given if (value := getattr(config, name)) != given[name])


def _ask_for_less(config: HeaprConfig) -> str:
    """What to change where a runtime's multiple is too large for the experts."""
    ways = ["lower tensor_parallel"] if config.tensor_parallel > 1 else []
    if config.align_for != "none":
        ways.append("use align_for='none', and a width_multiple")
    return " or ".join(ways)


def warn_of_stock_widths(config: HeaprConfig, kept: list[int], widths: list[int], itemsize: int) -> None:
    """Says so where a stock layout has experts that transformers refuses to run as it does by default, and which would do.

    Args:
        config (`HeaprConfig`): what was asked for.
        kept (`list[int]`): the widths that experts keep.
        widths (`list[int]`): those of the unpruned model.
        itemsize (`int`): bytes of a weight.
    """
    if config.layout == "variable":
        return
    stored = {padded_width(max(kept), config, widths)} if config.layout == "padded" else set(kept)
    step = max(16 // itemsize, 1)  # elements in 16 bytes
    broken = sorted(width for width in stored if width % step)
    if not broken:
        return
    below = broken[0] // step * step
    fitting = [
        f"{width} (ratio {1 - width / min(widths):.3f})" for width in (below, below + step) if 0 < width < min(widths)
    ]
    logger.warning(
        "layout=%r: the grouped_mm of transformers, its default, refuses experts of width %d, which is no multiple of %d; "
        "%sload the result with experts_implementation='eager'",
        config.layout,
        broken[0],
        step,
        f"plan for {' or '.join(fitting)} with width_multiple={step}, or " if fitting else "",
    )


def padded_width(widest: int, config: HeaprConfig, widths: list[int]) -> int:
    """Width that all experts are zero-padded to: `widest` rounded up to the multiple.

    It exceeds the width of the unpruned model only where a runtime's rule asks for that.
    """
    multiple = effective_multiple(config, widths)
    width = max(-(-widest // multiple), 1) * multiple
    return width if is_aligned_for_runtime(config) else min(width, max(widths))
