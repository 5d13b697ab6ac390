# Licensed under the Apache License, Version 2.0
"""Artefacts are compared as values, and print as a few lines."""

import copy

import pytest

from optimum_heapr import HeaprConfig
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.calibration.statistics import AtomicStatistics
from optimum_heapr.planning.plan import PruningPlan
from tests.helpers import calibration_data, tiny_model


@pytest.fixture(scope="module")
def artefacts():
    statistics = calibrate(tiny_model(), calibration_data(16, 16), gram=True)
    return statistics, PruningPlan.build(statistics, HeaprConfig(ratio=0.3))


def test_what_is_saved_and_loaded_is_equal(artefacts, tmp_path):
    for artefact, kind in zip(artefacts, (AtomicStatistics, PruningPlan)):
        artefact.save(tmp_path / "artefact")
        loaded = kind.load(tmp_path / "artefact")
        assert loaded == artefact and not loaded != artefact


def test_one_number_makes_a_difference(artefacts):
    statistics, plan = copy.deepcopy(artefacts)
    next(iter(statistics.blocks.values())).fisher_sum[0, 0] += 1
    next(iter(plan.kept.values()))[0] = next(iter(plan.kept.values()))[0][1:]
    assert statistics != artefacts[0] and plan != artefacts[1] and plan != "a plan"
    assert statistics.blocks["model.layers.1.mlp.experts"] == artefacts[0].blocks["model.layers.1.mlp.experts"]


def test_what_the_measuring_took_is_not_compared(artefacts):
    again = copy.deepcopy(artefacts[0])
    again.cost = None
    assert again == artefacts[0]


def test_they_print_as_a_few_lines(artefacts):
    statistics, plan = artefacts
    assert repr(statistics) == ("AtomicStatistics(qwen3_moe: 2 blocks of 6 experts of 12, second order, 32 tokens)")
    assert repr(plan).startswith("PruningPlan(qwen3_moe: 43 of 144 atomic experts go (29.86%), widths ")
    assert "estimated loss increase" in repr(plan) and len(repr(plan)) < 300
    assert repr(next(iter(statistics.blocks.values()))) == (
        "BlockStatistics(6 experts of 12, 64 routed tokens, second order)"
    )
    assert repr(HeaprConfig(ratio=0.3, criterion="obs")) == "HeaprConfig(ratio=0.3, criterion='obs')"
    assert eval(repr(plan.config), {"HeaprConfig": HeaprConfig}) == plan.config
