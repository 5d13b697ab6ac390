# Licensed under the Apache License, Version 2.0
"""Artefacts are compared as values, and print as a few lines."""

import copy
from xml.etree import ElementTree

import pytest

from optimum_heapr import HeaprConfig
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.calibration.statistics import AtomicStatistics
from optimum_heapr.planning.plan import PruningPlan
from optimum_heapr.utils.summary import html_table
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
    assert repr(statistics) == (
        "AtomicStatistics(model: qwen3_moe, 2 blocks, experts: 6 of width 12, measured: second order, on 32 tokens)"
    )
    lines = repr(plan).splitlines()
    assert lines[:3] == ["PruningPlan", "  model: qwen3_moe", "  removed: 43 of 144 atomic experts (29.86%)"]
    assert len(lines) == 6 and lines[-1].startswith("  estimate: loss +")
    assert repr(next(iter(statistics.blocks.values()))) == (
        "BlockStatistics(experts: 6 of width 12, routed tokens: 64, measured: second order)"
    )
    assert repr(HeaprConfig(ratio=0.3, criterion="obs")) == "HeaprConfig(ratio=0.3, criterion='obs')"
    assert eval(repr(plan.config), {"HeaprConfig": HeaprConfig}) == plan.config


def test_notebooks_show_them_as_a_table(artefacts):
    for artefact in (*artefacts, artefacts[1].config):
        shown = ElementTree.fromstring(artefact._repr_html_())
        assert [shown.tag, shown[0].tag, shown[0].text] == ["table", "caption", type(artefact).__name__]
        assert [[cell.text for cell in row] for row in shown[1:]] == [[*row] for row in artefact._summary().items()]
    assert html_table("<a>", [["1 < 2"]], ["b & c"]) == (
        "<table><caption>&lt;a&gt;</caption><tr><th>b &amp; c</th></tr><tr><td>1 &lt; 2</td></tr></table>"
    )
