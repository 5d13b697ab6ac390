# Licensed under the Apache License, Version 2.0
"""The frontier of one calibration: how small a model gets at which loss, by ratio, criterion, layout and number of experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
"""Of a curve, what is estimated at less than this part of its largest loss is measured only where noise would not hide it."""
NOISE = 0.25
"""That is where the standard error is less than this part of the increase."""


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
        num_experts (`int`, *optional*): as of `HeaprConfig`; `None` where all stay in the routers.
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
    num_experts: int | None = None

    @property
    def method(self) -> tuple[str, str, int | None]:
        """What the points of one curve have in common: criterion, layout and number of experts."""
        return self.criterion, self.layout, self.num_experts

    def method_name(self) -> str:
        """That in words."""
        return method_name(*self.method)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def config(self, others: HeaprConfig) -> HeaprConfig:
        """The config that asks for this plan; what a point does not say is as in `others`."""
        own = {"criterion": self.criterion, "layout": self.layout, "num_experts": self.num_experts}
        return others.replace(**own, ratio=self.asked)


def frontier(
    statistics: AtomicStatistics,
    config: HeaprConfig,
    ratios: Sequence[float] = RATIOS,
    criteria: Sequence[str] | None = None,
    layouts: Sequence[str] | None = None,
    num_experts: Sequence[int | None] | None = None,
    measure: Measure | None = None,
    points: int = MEASURED_POINTS,
    max_loss_increase: float | None = None,
) -> list[FrontierPoint]:
    """A plan at each ratio, for each criterion, layout and number of experts, from statistics alone; some of them measured.

    What is measured of each curve are its upper end, the point where the estimate is `MATTERS` times smaller, from `points=3` on the
    lowest below that at which, going by how the errors of these two grow, an increase could be told from noise, and then, again and
    again, the middle of the widest gap between measured losses. In between, the logarithm of measured over estimated is interpolated
    along that of the estimate; below, where noise hides what there is, it stays what it is at the lowest.

    Args:
        statistics (`AtomicStatistics`): of one calibration.
        config (`HeaprConfig`): all but ratio, criterion, layout and number of experts.
        ratios (`Sequence[float]`): asked for; those that a layout cannot have are left out and said.
        criteria, layouts (`Sequence[str]`, *optional*): those of `config` by default.
        num_experts (`Sequence[int]`, *optional*): how many stay in each router, `None` for all; that of `config` by default. In
            the layout `uniform`, which alone can have fewer; in the others all stay.
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

    numbers = list(dict.fromkeys([config.num_experts] if num_experts is None else num_experts))
    layouts = list(dict.fromkeys(layouts or [config.layout]))
    if "auto" in numbers:
        raise HeaprError(
            "num_experts='auto': is chosen by fits to the calibration text, ratio by ratio; name the numbers to compare, such as 32 "
            "24 16"
        )
    if num_experts is not None and "uniform" not in layouts:
        asked = ", ".join("all" if number is None else str(number) for number in numbers)
        raise HeaprError(
            f"num_experts={asked}: needs the layout uniform, not {', '.join(layouts)}; add it to the layouts"
        )

    def measured(point: FrontierPoint) -> FrontierPoint:
        increase, error = measure(PruningPlan.build(statistics, point.config(config)))
        return replace(point, measured=increase, error=error)

    found: list[FrontierPoint] = []
    for criterion in dict.fromkeys(criteria or [config.criterion]):
        for layout, number in [
            (layout, n) for layout in layouts for n in (numbers if layout == "uniform" else [None])
        ]:
            method = {"criterion": criterion, "layout": layout, "num_experts": number}
            curve = _curve(statistics, config.replace(**method, ratio=min(ratios)), sorted(ratios))
            found += _measured(curve, measured, points) if curve and measure is not None else curve
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
            logger.warning("%s: %s", method_name(config.criterion, config.layout, config.num_experts), error)
            continue
        _, after = planned_sizes(plan)
        point = FrontierPoint(
            criterion=config.criterion,
            layout=config.layout,
            ratio=plan.ratio,
            asked=ratio,
            parameters=after.parameters,
            active_parameters=after.active_parameters,
            num_bytes=after.num_bytes,
            estimated=plan.estimated_loss_increase,
            num_experts=None if config.num_experts is None else int(config.num_experts),
        )
        curve.setdefault(plan.ratio, point)  # a layout may round two ratios to one
    return [curve[ratio] for ratio in sorted(curve)]


def method_name(criterion: str, layout: str, num_experts: int | str | None = None) -> str:
    """What a curve is called."""
    return f"{criterion}, {layout}" + ("" if num_experts is None else f", {num_experts} experts")


def _corrected(curve: list[FrontierPoint]) -> list[FrontierPoint]:
    """The points of a curve, corrected by those that were measured with an increase of more than its error."""
    places = [
        (_log(point.estimated), math.log(point.measured) - _log(point.estimated))
        for point in curve
        if point.measured is not None and point.measured > point.error
    ]
    return [
        replace(point, calibrated=math.exp(at + _between(places, at)) if places else None)
        for point, at in ((point, _log(point.estimated)) for point in curve)
    ]


def _log(estimate: float) -> float:
    return math.log(max(estimate, 1e-12))


def _measured(
    curve: list[FrontierPoint], measured: Callable[[FrontierPoint], FrontierPoint], points: int
) -> list[FrontierPoint]:
    """A curve of which as many points are measured, and the others corrected by them."""
    found, values = list(curve), [_log(point.estimated) for point in curve]
    last = len(curve) - 1
    first = next(at for at, value in enumerate(values) if value >= values[last] - math.log(MATTERS))
    for at in {first, last}:
        found[at] = measured(curve[at])
    if points > 2 and first < last:
        deepest = values[first] - _depth(found[first], found[last])
        lowest = next(at for at, value in enumerate(values) if value >= deepest)
        if lowest < first:
            first, found[lowest] = lowest, measured(curve[lowest])
    while True:
        taken = [at for at, point in enumerate(found) if point.measured is not None]
        gaps = [(_gap(found[at], found[after]), at, after) for at, after in zip(taken, taken[1:]) if after - at > 1]
        if len(taken) >= points or not gaps:
            return _corrected(found)
        _, at, after = max(gaps)
        middle = (values[at] + values[after]) / 2
        nearest = min(range(at + 1, after), key=lambda index: abs(values[index] - middle))
        found[nearest] = measured(curve[nearest])


def _depth(low: FrontierPoint, high: FrontierPoint) -> float:
    """How far the logarithm of the estimate may fall below `low` until noise hides the loss, if that goes on as from `high` to it:
    the loss as a power of the estimate, and its relative error as one of the loss."""
    if not 0 < low.measured < high.measured or not low.error < NOISE * low.measured:
        return 0.0
    fall = math.log(high.measured / low.measured)
    if high.error == 0 or low.error / low.measured <= high.error / high.measured:
        return math.inf  # it does not grow
    growth = math.log(low.error / low.measured * high.measured / high.error) / fall
    return math.log(NOISE * low.measured / low.error) / growth * _log_ratio(high.estimated, low.estimated) / fall


def _gap(low: FrontierPoint, high: FrontierPoint) -> float:
    """How far two neighbours are apart, in the logarithm of what was measured, or where that is noise of the estimate."""
    if low.measured > low.error and high.measured > high.error:
        return abs(_log_ratio(high.measured, low.measured))
    return _log_ratio(high.estimated, low.estimated)


def _log_ratio(high: float, low: float) -> float:
    return _log(high) - _log(low)


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
