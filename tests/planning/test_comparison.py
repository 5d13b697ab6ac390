# Licensed under the Apache License, Version 2.0
"""How far two plans agree."""

import dataclasses

import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprError, PruningPlan
from optimum_heapr.planning.comparison import compare_plans
from tests.helpers import random_statistics


def plan_that_keeps(kept):
    plan = PruningPlan.build(random_statistics(blocks=2, experts=2, width=4), HeaprConfig(ratio=0.5))
    sets = [[torch.tensor(indices, dtype=torch.int64) for indices in experts] for experts in kept]
    return dataclasses.replace(plan, kept=dict(zip(plan.kept, sets)), loss_increase=dict(zip(plan.kept, (0.1, 0.2))))


def test_counts_are_of_sets():
    first = plan_that_keeps([[[0, 1, 2], [3]], [[0], []]])
    second = plan_that_keeps([[[1, 2, 3], [0]], [[0], []]])
    one, other, together = compare_plans(first, second)
    assert (one.kept, one.both, one.total) == ((4, 4), 2, 8) and one.overlap == pytest.approx(2 / 6)
    # Two halves of eight have two in common by chance, of the six that either has.
    assert one.by_chance == pytest.approx(2 / 6)
    assert other.overlap == 1.0 and (together.path, together.total, together.both) == ("all", 16, 3)
    assert together.loss_increase == pytest.approx((0.3, 0.3))
    assert (one.widths, other.widths, together.widths) == (((1, 3), (1, 3)), ((0, 1), (0, 1)), ((0, 3), (0, 3)))
    nothing = plan_that_keeps([[[], []], [[], []]])
    assert compare_plans(nothing, nothing)[0].overlap == 1.0


def test_plans_of_two_models_are_refused():
    plan = plan_that_keeps([[[0], [1]], [[2], [3]]])
    wider = PruningPlan.build(random_statistics(blocks=2, experts=2, width=8), HeaprConfig())
    with pytest.raises(HeaprError, match="models with other shapes"):
        compare_plans(plan, wider)
    with pytest.raises(HeaprError, match="models with other weights"):
        compare_plans(plan, dataclasses.replace(plan, model={**plan.model, "weights": "0"}))
