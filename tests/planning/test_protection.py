# Licensed under the Apache License, Version 2.0
"""Layers and experts that stay whole because they were named."""

import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from optimum_heapr.planning.protection import protected_experts
from tests.helpers import random_statistics, tiny_model


BLOCKS = {f"model.layers.{index}.mlp.experts": 6 for index in range(12)}
FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("protect", "expected"),
    [
        (None, {}),
        ("model.layers.0.*", {0: [0, 1, 2, 3, 4, 5]}),
        ("model.layers.3.mlp.experts:5,1,1", {3: [1, 5]}),
        (["model.layers.4.*:2", "model.layers.1?.*:0", "*.4.mlp.experts:1"], {4: [1, 2], 10: [0], 11: [0]}),
        ("*:3", {index: [3] for index in range(12)}),
        ("model.layers.[01].*:0 model.layers.1.*", {0: [0], 1: [0, 1, 2, 3, 4, 5]}),
    ],
)
def test_patterns(protect, expected):
    named = {f"model.layers.{index}.mlp.experts": experts for index, experts in expected.items()}
    assert protected_experts(HeaprConfig(protect=protect), BLOCKS) == named


@pytest.mark.parametrize("allocation", ["global", "layer"])
def test_what_is_protected_stays_whole_and_the_rest_makes_up_for_it(allocation):
    statistics = random_statistics()
    config = HeaprConfig(ratio=0.25, allocation=allocation, protect=f"{FIRST}:1,3")
    plan = PruningPlan.build(statistics, config)
    assert [plan.widths[FIRST][expert] for expert in (1, 3)] == [8, 8]
    assert plan.removed == 16
    least = PruningPlan.build(statistics, config.replace(protect=None))
    assert min(least.widths[FIRST][expert] for expert in (1, 3)) < 8


def test_a_whole_layer():
    statistics = random_statistics()
    config = HeaprConfig(ratio=0.25, protect="model.layers.1.*")
    plan = PruningPlan.build(statistics, config)
    assert plan.widths[SECOND] == [8] * 4 and plan.removed == 16
    plan = PruningPlan.build(statistics, config.replace(allocation="layer"))
    assert plan.widths[SECOND] == [8] * 4 and plan.removed == 8  # a share of each other layer


def test_together_with_what_calibration_did_not_reach():
    statistics = random_statistics(unreached={0: [2]})
    config = HeaprConfig(ratio=0.25, protect=f"{FIRST}:0", protect_unreached=True)
    plan = PruningPlan.build(statistics, config)
    assert plan.widths[FIRST][0] == plan.widths[FIRST][2] == 8 and plan.removed == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protect": "model.layers.7.*"}, r"protect='model.layers.7.\*': matches no expert block.*layers.0.*layers.1"),
        ({"protect": "*:4"}, r"protect='\*:4': model.layers.0.mlp.experts has no expert 4; its experts are 0 to 3"),
        ({"protect": "*:a"}, r"protect='\*:a': what follows the colon must be numbers.*\*:3,7"),
        ({"protect": "*:"}, r"protect='\*:': what follows the colon must be numbers"),
        ({"protect": f"{FIRST}:1", "allocation": "uniform"}, "protect=.*allocation='uniform'.*use global or layer"),
        ({"protect": "model.layers.0.*", "ratio": 0.6}, r"protect='model.layers.0.\*'.*leave only 0.5000 to remove"),
        ({"protect": "*", "allocation": "layer"}, r"protect='\*': leaves nothing to remove; protect less"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(HeaprError, match=message):
        PruningPlan.build(random_statistics(), HeaprConfig(**options))


def test_a_wrong_name_is_refused_before_calibration():
    pruner = HeaprPruner(tiny_model(), config=HeaprConfig(protect="model.layers.9.*"))
    with pytest.raises(HeaprError, match="matches no expert block"):
        pruner.prune()
    assert pruner.statistics is None


def test_it_is_kept_in_the_plan(tmp_path):
    plan = PruningPlan.build(random_statistics(), HeaprConfig(protect=["model.layers.0.*", f"{SECOND}:1"]))
    plan.save(tmp_path / "plan.safetensors")
    assert PruningPlan.load(tmp_path / "plan.safetensors").config.protect == f"model.layers.0.* {SECOND}:1"
    assert torch.equal(plan.kept[FIRST][0], torch.arange(8))
