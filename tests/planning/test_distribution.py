# Licensed under the Apache License, Version 2.0
"""The histogram of importance counts every atomic expert once, and knows the cut where there is one."""

import pytest
import torch

from optimum_heapr import HeaprConfig, PruningPlan
from optimum_heapr.planning.distribution import BINS, importance_distribution
from tests.helpers import random_statistics


def distribution(values: list[float], kept: list[int]) -> dict:
    stays = torch.zeros(1, len(values), dtype=torch.bool)
    stays[0, kept] = True
    return importance_distribution({"block": torch.tensor([values])}, {"block": stays})


def test_counts_are_those_of_the_scores():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).mul(20).exp().tolist()
    kept = sorted(range(50), key=values.__getitem__)[20:]
    found = distribution(values, sorted(kept))
    assert found["scale"] == "log" and found["cut"] == pytest.approx(sorted(values)[19], rel=1e-5)
    assert sum(found["kept"]) == 30 and sum(found["removed"]) == 20 and found["below"] == [0, 0]
    assert len(found["edges"]) == BINS + 1 and len(found["kept"]) == len(found["removed"]) == BINS
    for index in range(BINS):
        low, high = found["edges"][index : index + 2]
        inside = sum(low * (1 + 1e-5) < value < high * (1 - 1e-5) for value in values)
        assert abs(found["kept"][index] + found["removed"][index] - inside) <= 1


def test_scores_of_one_size_are_shown_as_they_are():
    found = distribution([1.0, 2.0, 3.0, 4.0], [2, 3])
    assert found["scale"] == "linear" and (found["edges"][0], found["edges"][-1]) == (1.0, 4.0) and found["cut"] == 2.0
    assert found["kept"][-1] == found["removed"][0] == 1


def test_what_a_logarithm_cannot_show_is_counted_apart():
    found = distribution([0.0, -0.7, 1e-9, 1e-3, 1.0], [1, 4])
    assert found["scale"] == "log" and found["below"] == [1, 1] and sum(found["kept"]) == 1


def test_there_is_no_cut_where_each_layer_has_its_own():
    statistics = random_statistics(4, 4, 16)
    statistics.blocks["model.layers.0.mlp.experts"].activation_sq_sum *= 1000
    plans = {
        name: PruningPlan.build(statistics, HeaprConfig(ratio=0.5, allocation=name)) for name in ("global", "layer")
    }
    assert plans["global"].importance["cut"] is not None and plans["layer"].importance["cut"] is None


def test_scores_that_are_all_alike():
    found = distribution([0.0, 0.0], [0])
    assert sum(found["kept"]) + sum(found["removed"]) + sum(found["below"]) == 2


def test_a_plan_on_disk_has_it(tmp_path):
    plan = PruningPlan.build(random_statistics(unreached={1: [2]}), HeaprConfig())
    plan.save(tmp_path / "plan")
    loaded = PruningPlan.load(tmp_path / "plan")
    assert loaded.importance == plan.importance and sum(plan.importance["below"]) == 8
    assert loaded.tokens == plan.tokens and plan.tokens["model.layers.1.mlp.experts"][2] == 0
