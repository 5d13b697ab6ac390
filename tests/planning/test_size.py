# Licensed under the Apache License, Version 2.0
"""The sizes that a plan announces are those that the pruned model has."""

import pytest
import torch

from optimum_heapr import HeaprConfig
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.evaluation.size import ModelSize
from optimum_heapr.planning.plan import PruningPlan
from optimum_heapr.planning.size import planned_sizes
from optimum_heapr.surgery.apply import apply_plan
from tests.helpers import calibration_data, tiny_model


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen2_moe", "variable"),
        ("qwen2_moe", "uniform"),
        ("gpt_oss", "variable"),
        ("gpt_oss", "uniform"),
        ("deepseek", "variable"),
    ],
)
def test_sizes_are_those_of_the_models(family, layout, tmp_path):
    model = tiny_model(family, dtype=torch.bfloat16)
    statistics = calibrate(model, calibration_data(16, 16))
    allocation = "uniform" if layout == "uniform" else "global"
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=0.4, layout=layout, allocation=allocation))
    plan.save(tmp_path / "plan.safetensors")
    before, after = planned_sizes(PruningPlan.load(tmp_path / "plan.safetensors"))
    for planned in (before, after):
        measured = ModelSize.of(model, plan.tokens)
        assert planned.parameters == measured.parameters and planned.num_bytes == measured.weight_bytes
        assert planned.active_parameters == pytest.approx(measured.active_parameters, abs=1)
        if planned is before:
            apply_plan(model, plan)


def test_what_a_plan_does_not_know_is_left_out():
    plan = PruningPlan.build(calibrate(tiny_model(), calibration_data(16)), HeaprConfig())
    plan.storage, plan.model = {}, {**plan.model, "experts_per_token": None}
    for size in planned_sizes(plan):
        assert size.num_bytes is None and size.active_parameters is None
