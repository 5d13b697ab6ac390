# Licensed under the Apache License, Version 2.0
"""The frontier of one calibration: how small a model gets at which loss, by ratio, criterion and layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .planning.errors import UnreachableRatio
from .planning.plan import PruningPlan
from .planning.size import planned_sizes
from .utils.errors import HeaprError
from .utils.logging import get_logger


if TYPE_CHECKING:
    from .calibration.statistics import AtomicStatistics
    from .configuration import HeaprConfig
    from .measuring import Measure


logger = get_logger(__name__)

RATIOS = tuple(round(0.05 * step, 2) for step in range(1, 19))
MEASURED_POINTS = 5
MATTERS = 30
"""Of a curve, what is estimated at less than this part of its largest loss is not measured: noise would hide it."""


@dataclass(frozen=True)
class FrontierPoint:
    """One plan.

    Attributes:
        criterion, layout (`str`): as of `HeaprConfig`.
        ratio (`float`): share of the routed atomic experts that goes, reached.
        asked (`float`): the ratio to ask for, which gives that.
        parameters, active_parameters, num_bytes (`int`, *optional*): as of [`~optimum_heapr.planning.size.PlannedSize`].
        estimated (`float`): increase of the loss from the statistics, nats a token. It is low, and not comparable between
            criteria.
        measured, error (`float`, *optional*): increase on text, with the compensation of the plan, and its standard error.
        calibrated (`float`, *optional*): the estimate, corrected by what was measured at other ratios of the same curve; where
            that was no increase it has nothing to correct by.
    """

    criterion: str
    layout: str
    ratio: float
    asked: float
    parameters: int
    active_parameters: int | None
    num_bytes: int | None
    estimated: float
    measured: float | None = None
    error: float | None = None
    calibrated: float | None = None

    @property
    def method(self) -> tuple[str, str]:
        """What the points of one curve have in common: criterion and layout."""
        return self.criterion, self.layout

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def config(self, others: HeaprConfig) -> HeaprConfig:
        """The config that asks for this plan; what a point does not say is as in `others`."""
        return others.replace(criterion=self.criterion, layout=self.layout, ratio=self.asked)


def frontier(
    statistics: AtomicStatistics,
    config: HeaprConfig,
    ratios: Sequence[float] = RATIOS,
    criteria: Sequence[str] | None = None,
    layouts: Sequence[str] | None = None,
    measure: Measure | None = None,
    points: int = MEASURED_POINTS,
    max_loss_increase: float | None = None,
) -> list[FrontierPoint]:
    """A plan at each ratio, for each criterion and layout, from statistics alone; some of them measured.

    What is measured of each curve are its upper end, the point where the estimate is `MATTERS` times smaller, and then, again
    and again, the middle of the widest gap in the logarithm of the estimate. In between, the logarithm of measured over estimated
    is interpolated; below, it stays what it is at the lowest.

    Args:
        statistics (`AtomicStatistics`): of one calibration.
        config (`HeaprConfig`): all but ratio, criterion and layout.
        ratios (`Sequence[float]`): asked for; those that a layout cannot have are left out and said.
        criteria, layouts (`Sequence[str]`, *optional*): those of `config` by default.
        measure (`Callable`, *optional*): such as [`~optimum_heapr.measuring.loss_measure`] gives.
        points (`int`): measured of each curve, at least 2.
        max_loss_increase (`float`, *optional*): measure also what it takes until what [`smallest_within`] it gives is a point
            that was measured.

    Returns:
        `list[FrontierPoint]`: curve by curve, with rising ratios.

    Raises:
        HeaprError: if an option is wrong, the statistics do not serve a criterion, or no ratio can be had.
    """
    if max_loss_increase is not None and measure is None:
        raise HeaprError(
            f"max_loss_increase={max_loss_increase}: is chosen by what was measured; name a text to measure on"
        )
    if points < 2:
        raise HeaprError(f"points={points}: must be at least 2, the ends of a curve")

    def measured(point: FrontierPoint) -> FrontierPoint:
        increase, error = measure(PruningPlan.build(statistics, point.config(config)))
        return replace(point, measured=increase, error=error)

    found: list[FrontierPoint] = []
    for criterion in criteria or (config.criterion,):
        for layout in layouts or (config.layout,):
            asked = config.replace(criterion=criterion, layout=layout, ratio=min(ratios))
            curve = _curve(statistics, asked, sorted(ratios))
            if curve and measure is not None:
                some = _spread([_log(point.estimated) for point in curve], points)
                curve = _corrected([measured(point) if at in some else point for at, point in enumerate(curve)])
            found += curve
    if not found:
        raise HeaprError(f"ratios={list(ratios)}: none can be had in this layout; ask for others")
    while max_loss_increase is not None:
        chosen = smallest_within(found, max_loss_increase)
        if chosen is None or chosen.measured is not None:
            break
        found[found.index(chosen)] = measured(chosen)
        places = [at for at, point in enumerate(found) if point.method == chosen.method]
        for at, point in zip(places, _corrected([found[at] for at in places])):
            found[at] = point
    return found


def _curve(statistics: AtomicStatistics, config: HeaprConfig, ratios: list[float]) -> list[FrontierPoint]:
    curve: dict[float, FrontierPoint] = {}
    for ratio in ratios:
        try:
            plan = PruningPlan.build(statistics, config.replace(ratio=ratio))
        except UnreachableRatio as error:
            logger.warning("%s, %s: %s", config.criterion, config.layout, error)
            continue
        _, after = planned_sizes(plan)
        sizes = (after.parameters, after.active_parameters, after.num_bytes)
        method = (config.criterion, config.layout)
        # A layout may round two ratios to one.
        curve.setdefault(plan.ratio, FrontierPoint(*method, plan.ratio, ratio, *sizes, plan.estimated_loss_increase))
    return [curve[ratio] for ratio in sorted(curve)]


def _corrected(curve: list[FrontierPoint]) -> list[FrontierPoint]:
    """The points of a curve, corrected by those that were measured where that can be told from noise."""
    places = [
        (_log(point.estimated), math.log(point.measured) - _log(point.estimated))
        for point in curve
        if point.measured is not None and point.measured > 0
    ]
    return [
        replace(point, calibrated=math.exp(at + _between(places, at)) if places else None)
        for point, at in ((point, _log(point.estimated)) for point in curve)
    ]


def _log(estimate: float) -> float:
    return math.log(max(estimate, 1e-12))


def _spread(values: list[float], count: int) -> list[int]:
    """Indices of the first of rising values that matters and of the last, and of those that halve the widest gaps between."""
    first = next(index for index, value in enumerate(values) if value >= values[-1] - math.log(MATTERS))
    chosen = sorted({first, len(values) - 1})
    while len(chosen) < min(count, len(values) - first):
        gaps = [(values[after] - values[at], at, after) for at, after in zip(chosen, chosen[1:]) if after - at > 1]
        _, at, after = max(gaps)
        middle = (values[at] + values[after]) / 2
        chosen = sorted([*chosen, min(range(at + 1, after), key=lambda index: abs(values[index] - middle))])
    return chosen


def _between(places: list[tuple[float, float]], value: float) -> float:
    """At `value`, the straight line through the places beside it; outside of them, that of the nearest."""
    below = max((place for place in places if place[0] <= value), default=min(places))
    above = min((place for place in places if place[0] >= value), default=max(places))
    share = 0.0 if above[0] == below[0] else (value - below[0]) / (above[0] - below[0])
    return below[1] + share * (above[1] - below[1])


def smallest_within(points: Sequence[FrontierPoint], max_loss_increase: float) -> FrontierPoint | None:
    """The smallest model whose loss rises by no more than that, if there is one.

    What counts is what was measured, with one standard error on top, or else the calibrated estimate; [`frontier`] with
    `max_loss_increase` measures what is the smallest then.

    Args:
        points (`Sequence[FrontierPoint]`): of a frontier that was measured.
        max_loss_increase (`float`): nats a token.
    """
    losses = [
        (point, point.calibrated if point.measured is None else point.measured + point.error) for point in points
    ]
    within = [point for point, loss in losses if loss is not None and loss <= max_loss_increase]
    return min(within, key=lambda point: point.parameters, default=None)
