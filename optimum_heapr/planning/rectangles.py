# Licensed under the Apache License, Version 2.0
"""Numbers of experts and widths of one size, from all experts narrow to few experts wide."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..utils.errors import HeaprError
from .alignment import effective_multiple, is_aligned_for_runtime
from .dropping import routing_of
from .goal import Goal


if TYPE_CHECKING:
    from ..calibration.statistics import AtomicStatistics
    from ..configuration import HeaprConfig


STEPS = 16
"""Into how many steps the number of experts is divided."""

_ROUNDING = 1e-6  # of a count that was a share

Rectangle = tuple[int, int]
"""Experts of each layer, and how wide each is."""


def rectangles(statistics: AtomicStatistics, config: HeaprConfig) -> dict[Rectangle, HeaprConfig]:
    """What `num_experts="auto"` chooses from.

    None is larger than what the layout would keep with all experts: with a ratio its width rounded up to the multiple, with a
    target or a runtime's rule what these allow. From there experts go in steps of a sixteenth, and the width is the largest
    multiple that they leave room for.

    Args:
        statistics (`AtomicStatistics`): what calibration measured.
        config (`HeaprConfig`): how much goes, and what widths are multiples of.

    Returns:
        `dict[Rectangle, HeaprConfig]`: the config that gives each, the one with the most experts first.

    Raises:
        HeaprError: if the model cannot lose experts, or there is no such width.
    """
    block = next(iter(statistics.blocks.values()))
    experts, width = block.num_experts, block.width
    plain = config.replace(num_experts=None)
    goal, multiple = Goal.of(plain, statistics), effective_multiple(plain, [width])
    groups = routing_of(statistics, experts)["groups"]
    room = (1 - goal.ratio) * experts * width  # atomic experts of one layer
    if not (goal.is_bound or is_aligned_for_runtime(config)):
        room = experts * multiple * math.ceil(round(room / experts) / multiple)
    found = {}

    def widest(count: int) -> int:
        return min(int(room / count + _ROUNDING), width) // multiple * multiple

    for step in range(STEPS):
        each = widest(max(experts - round(step * experts / STEPS), 1))
        count = min(int(room / max(each, 1) + _ROUNDING), experts) // groups * groups
        if each and count and _allows(statistics, count):
            rectangle = count, widest(count)
            ratio = 1 - count * rectangle[1] / (experts * width)
            if 0 < ratio < 1:
                found.setdefault(rectangle, plain.replace(num_experts=count, ratio=ratio))
    if not found:
        raise HeaprError(
            f"num_experts='auto': {goal.asked} leaves no number of experts with a width that is a multiple of {multiple}; ask "
            "for another"
        )
    return found


def _allows(statistics: AtomicStatistics, count: int) -> bool:
    try:
        routing_of(statistics, count)
    except HeaprError:
        return False
    return True
