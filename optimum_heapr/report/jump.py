# Licensed under the Apache License, Version 2.0
"""A loss that jumped: whether pruning did far more harm than it was estimated to, and what is said then.

A dozen atomic experts of a million can ruin a model (super experts, arXiv 2507.23279), and no sum over calibration tokens need
show it. Measuring does.
"""

from __future__ import annotations

import math
from typing import Any

from ..utils.errors import HeaprError
from .numbers import signed


BEYOND = 15.0
"""Times the estimate. What sane prunings cost was measured at up to 7 times it, where it was as much as `MATTERS`; see
`docs/source/guides/report.md`."""

MATTERS = 0.1
"""Nats a token: less than this, two standard errors left out, is no ruin whatever the estimate was."""


def jumped(loss: dict[str, Any]) -> bool:
    """Whether what was measured is far beyond the estimate.

    Args:
        loss (`dict`): of a report, with what was measured if anything was.
    """
    if "measured" not in loss:
        return False
    increase, error = loss["measured"]["increase"], loss["measured"]["increase_standard_error"]
    return increase - 2 * error > max(MATTERS, BEYOND * loss["estimated_increase"])


def jump_text(report: dict[str, Any]) -> str | None:
    """What is to be said of a jump, in one sentence or two; `None` if there was none."""
    loss = report["loss"]
    if "jump" not in loss:
        return None
    estimate, increase = loss["estimated_increase"], loss["measured"]["increase"]
    times = increase / estimate if estimate > 0 else math.inf
    text = (
        f"the loss rose by {signed(increase)} nats a token, {times:,.0f} times the estimate of {estimate:.4f}, "
        f"and sane prunings were never seen to cost {BEYOND:g} times: "
    )
    found = loss["jump"]
    if "unknown" in found:
        return text + f"which layer did it was not found out ({found['unknown']})"
    layer, before, after = found["layer"], signed(found["increase"]), signed(found["restored"])
    return (
        text
        + (
            f"{layer} did it"
            if found["restored"] < found["increase"] / 4
            else f"no layer did it alone, {layer} most of it"
        )
        + f", for with that layer as it was the {found['windows']} windows that lost most lose {after} in place of {before}"
    )


def refuse_jump(report: dict[str, Any] | None) -> None:
    """Refuses a pruned model whose loss jumped, or was not measured.

    Args:
        report (`dict`, *optional*): of the pruning.

    Raises:
        HeaprError: saying what happened, and what to do about it.
    """
    if report is None or "measured" not in report["loss"]:
        problems = (report or {}).get("problems", [])
        reason = next((f" ({text})" for text in problems if text.partition(": ")[2].startswith("loss: ")), "")
        otherwise = "look at that" if reason else "name text with eval_dataset"
        raise HeaprError(
            f"strict=True: nothing was measured that could have jumped{reason}; {otherwise}, or do without strict=True"
        )
    text = jump_text(report)
    if text is not None:
        layer = report["loss"]["jump"].get("layer", "BLOCK")
        raise HeaprError(
            f"strict=True: {text}; remove less, calibrate on more text, or keep what must stay with protect='{layer}.*'"
        )
