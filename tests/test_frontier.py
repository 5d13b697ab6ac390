# Licensed under the Apache License, Version 2.0
"""Many plans from one calibration: their sizes, estimates, and what measuring some of them says of the others."""

import math

import pytest

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.frontier import frontier, smallest_within
from optimum_heapr.measuring import loss_measure
from optimum_heapr.planning.plan import PruningPlan
from optimum_heapr.planning.size import planned_sizes
from tests.helpers import calibration_data, tiny_model


RATIOS = (0.1, 0.2, 0.4, 0.5, 0.7)


@pytest.fixture(scope="module")
def statistics():
    return calibrate(tiny_model(), calibration_data(16, 16), gram=True)


def test_points_are_what_the_plans_say(statistics):
    points = frontier(statistics, HeaprConfig(), RATIOS, ["heapr", "obs"], ["variable", "uniform"])
    assert len(points) == 4 * len(RATIOS)
    for point in points:
        config = HeaprConfig(criterion=point.criterion, layout=point.layout, ratio=point.ratio)
        plan = PruningPlan.build(statistics, config)
        assert (point.ratio, point.estimated) == (plan.ratio, plan.estimated_loss_increase)
        after = planned_sizes(plan)[1]
        assert (point.parameters, point.active_parameters, point.num_bytes) == (
            after.parameters,
            after.active_parameters,
            after.num_bytes,
        )
    for curve in (points[:5], points[5:10]):
        assert [point.ratio for point in curve] == sorted(point.ratio for point in curve)
        assert all(point.measured is None and point.calibrated is None for point in curve)


def test_measured_points_correct_the_others(statistics):
    """Three times the estimate everywhere: all of the curve is then known."""
    measured = []

    def measure(plan):
        measured.append(plan.ratio)
        return 3 * plan.estimated_loss_increase, plan.estimated_loss_increase

    points = frontier(statistics, HeaprConfig(), RATIOS, measure=measure, points=3)
    assert len(measured) == 3 and points[-1].ratio in measured and points[0].ratio not in measured
    for point in points:
        assert point.calibrated == pytest.approx(3 * point.estimated)
        assert (point.measured is None) == (point.ratio not in measured) == (point.error is None)


def test_the_correction_is_interpolated_and_noise_corrects_nothing(statistics):
    """A power of the estimate is found from two points; and a point without an increase is left out."""

    def power(plan):
        return 7 * plan.estimated_loss_increase**1.5, 0.0

    for point in frontier(statistics, HeaprConfig(), RATIOS, measure=power, points=2):
        if point.ratio >= 0.4:  # between the two
            assert point.calibrated == pytest.approx(7 * point.estimated**1.5)

    def noise(plan):
        return 2 * plan.estimated_loss_increase if plan.ratio > 0.6 else 0.001, 0.002

    points = frontier(statistics, HeaprConfig(), RATIOS, measure=noise)
    assert all(point.calibrated == pytest.approx(2 * point.estimated) for point in points)
    points = frontier(statistics, HeaprConfig(), RATIOS, measure=lambda plan: (0.0, 0.1))
    assert all(point.calibrated is None for point in points)


def test_what_is_measured_is_the_loss_of_the_masked_model(statistics):
    windows = calibration_data(16, 16, 16).samples
    measure = loss_measure(tiny_model(), windows)
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=0.7))
    increase, error = measure(plan)
    assert math.isfinite(increase) and increase != 0 and error > 0
    assert measure(plan) == (increase, error), "the model is as it was"


MANY = tuple(round(0.05 * step, 2) for step in range(1, 19))


def measured_at(statistics, error, points, loss=None) -> list[float]:
    """The ratios that are measured where the estimate is right, or `loss` makes of it, with an error of so much of it."""
    taken = []

    def measure(plan):
        taken.append(round(plan.ratio, 2))
        increase = (loss or float)(plan.estimated_loss_increase)
        return increase, increase * error(increase)

    frontier(statistics, HeaprConfig(), MANY, measure=measure, points=points)
    return taken


def test_what_is_measured_reaches_down_to_where_noise_hides_it(statistics):
    """An error that grows as the cube root of the loss is a quarter at a loss known beforehand; below it nothing is measured."""
    estimates = {point.asked: point.estimated for point in frontier(statistics, HeaprConfig(), MANY)}
    top = estimates[0.9]
    thirtieth = min(ratio for ratio, estimate in estimates.items() if estimate >= top / 30)
    assert thirtieth > 0.1, "there is something below"
    for share in (0.003, 0.01, 0.02):  # of the largest loss, where the error is a quarter
        taken = measured_at(statistics, lambda loss: 0.25 * (share * top / loss) ** (1 / 3), 3)
        expected = min(ratio for ratio, estimate in estimates.items() if estimate >= share * top * (1 - 1e-6))
        assert sorted(taken[:2]) == [thirtieth, 0.9] and taken[2] == expected < thirtieth
    assert min(measured_at(statistics, lambda loss: 0.3, 5)) == thirtieth, "noise hides what is below"
    assert min(measured_at(statistics, lambda loss: 0.1, 5)) == 0.05, "an error that does not grow hides nothing"


def test_the_widest_gap_between_losses_is_halved(statistics):
    """All of the loss lies between the uppermost two: there the others are measured."""
    estimates = {point.asked: point.estimated for point in frontier(statistics, HeaprConfig(), MANY)}
    half = (estimates[0.7] + estimates[0.9]) / 2
    taken = measured_at(
        statistics, lambda loss: 0.3, 6, lambda estimate: 1.0 if estimate > half else 1e-6 * estimate**0.01
    )
    assert sum(ratio >= 0.65 for ratio in taken) >= 4 and len(taken) == len(set(taken)) == 6


def test_ratios_that_a_layout_rounds_to_one_are_one_point(statistics):
    config = HeaprConfig(layout="uniform", width_multiple=4)
    points = frontier(statistics, config, (0.3, 0.32, 0.6))
    assert len(points) == len({point.ratio for point in points})


def test_numbers_of_experts_are_compared_at_one_layout(statistics):
    config = HeaprConfig(criterion="heapr", width_multiple=2)
    points = frontier(statistics, config, RATIOS, layouts=["variable", "uniform"], num_experts=[None, 4, 3])
    curves = list(dict.fromkeys(point.method for point in points))
    assert curves == [("heapr", "variable", None)] + [("heapr", "uniform", number) for number in (None, 4, 3)]
    for point in points:
        plan = PruningPlan.build(statistics, point.config(config))
        assert (point.ratio, point.estimated) == (plan.ratio, plan.estimated_loss_increase)
        assert all(len(experts) == (point.num_experts or 6) for experts in plan.routed.values())
        assert point.parameters == planned_sizes(plan)[1].parameters
    assert points[-1].method_name() == "heapr, uniform, 3 experts"
    points = frontier(statistics, config.replace(layout="uniform", num_experts=4, ratio=0.5), RATIOS)
    assert {point.num_experts for point in points} == {4}


def test_refusals(statistics):
    with pytest.raises(HeaprError, match="num_experts=4: needs the layout uniform, not variable"):
        frontier(statistics, HeaprConfig(), num_experts=[4])
    with pytest.raises(HeaprError, match="num_experts='auto': is chosen by fits to the calibration text"):
        frontier(statistics, HeaprConfig(), layouts=["uniform"], num_experts=["auto"])
    with pytest.raises(HeaprError, match="num_experts=40: must lie between"):
        frontier(statistics, HeaprConfig(), layouts=["uniform"], num_experts=[40])
    with pytest.raises(HeaprError, match="points=1: must be at least 2"):
        frontier(statistics, HeaprConfig(), points=1)
    with pytest.raises(HeaprError, match="must be one of"):
        frontier(statistics, HeaprConfig(), criteria=["heap"])
    with pytest.raises(HeaprError, match="none can be had"):
        frontier(statistics, HeaprConfig(width_multiple=12), (0.01,))


def test_what_is_chosen_was_measured(statistics):
    """The estimate corrected by the ends says half; measured there it costs more, and the next that was measured is taken."""
    measured = []

    def measure(plan):
        measured.append(plan.ratio)
        return plan.ratio if plan.ratio < 0.45 or plan.ratio > 0.6 else 2.0, 0.05

    points = frontier(statistics, HeaprConfig(), RATIOS, measure=measure, points=2, max_loss_increase=0.6)
    chosen = smallest_within(points, 0.6)
    assert chosen.measured == chosen.ratio == pytest.approx(0.4, abs=0.01) and len(measured) == len(set(measured)) == 3
    assert [point.measured is not None for point in points] == [False, False, True, True, True]
    assert points[3].measured == points[3].calibrated == pytest.approx(2.0)
    assert chosen.config(HeaprConfig()) == HeaprConfig(ratio=0.4)
    with pytest.raises(HeaprError, match="max_loss_increase=0.6: is chosen by what was measured"):
        frontier(statistics, HeaprConfig(), RATIOS, max_loss_increase=0.6)


def test_the_smallest_model_within_a_budget(statistics):
    points = frontier(statistics, HeaprConfig(), RATIOS, measure=lambda plan: (plan.ratio, 0.05), points=5)
    chosen = smallest_within(points, 0.52)
    assert chosen.ratio == pytest.approx(0.4, abs=0.01), "half of it costs 0.5 and an error of 0.05"
    assert smallest_within(points, 1e-9) is None


def test_the_pruner_has_it_too(statistics, monkeypatch):
    from datasets import Dataset

    pruner = HeaprPruner(tiny_model(), config=HeaprConfig(criterion="obs"))
    with pytest.raises(HeaprError, match="nothing was measured yet"):
        pruner.frontier()
    pruner.statistics = statistics
    points = pruner.frontier(ratios=RATIOS, layouts=["variable", "padded"])
    assert points == frontier(statistics, HeaprConfig(criterion="obs"), RATIOS, layouts=["variable", "padded"])
    text = Dataset.from_dict({"input_ids": [sample.tolist() for sample in calibration_data(16, 16, 16).samples]})
    points = pruner.frontier(text, ratios=RATIOS, points=2)
    windows = calibration_data(16, 16, 16).samples
    expected = loss_measure(tiny_model(), windows)(
        PruningPlan.build(statistics, HeaprConfig(criterion="obs", ratio=0.7))
    )
    assert (points[-1].measured, points[-1].error) == pytest.approx(expected, abs=1e-5)
    pruner.config = HeaprConfig(compensate=True, compensation_scope="block")
    with pytest.raises(HeaprError, match="compensation_scope='block': a frontier measures without it"):
        pruner.frontier(text)
