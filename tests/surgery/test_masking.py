# Licensed under the Apache License, Version 2.0
"""A masked model is the pruned one, and afterwards the unpruned one again."""

import copy

import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprError
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.planning.plan import PruningPlan
from optimum_heapr.surgery.apply import apply_plan
from optimum_heapr.surgery.masking import masked
from tests.helpers import calibration_data, tiny_model


@pytest.mark.parametrize(
    "options",
    [{}, {"compensate": True}, {"compensate": True, "compensation_scope": "block"}],
    ids=["plain", "expert", "block"],
)
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek"])
@torch.no_grad()
def test_a_masked_model_computes_what_the_pruned_one_does(family, options):
    model, data = tiny_model(family), calibration_data(16, 16)
    with torch.enable_grad():
        statistics = calibrate(model, data, gram=bool(options))
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=0.6, **options))
    before, ids = copy.deepcopy(model.state_dict()), torch.arange(3, 19).unsqueeze(0)
    with pytest.raises(RuntimeError, match="something"), masked(model, plan, statistics, data):
        logits = model(input_ids=ids).logits
        raise RuntimeError("something")
    assert not plan.compensation, "the plan is as it was"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    unpruned = model(input_ids=ids).logits
    pruned = apply_plan(model, plan, statistics, data)(input_ids=ids).logits
    assert bool(plan.compensation) == bool(options)
    # As many float32 roundings as sums have terms, relative to the largest number.
    eps = torch.finfo(torch.float32).eps * 64 * unpruned.abs().max()
    torch.testing.assert_close(logits, pruned, rtol=0, atol=float(eps))
    assert (logits - unpruned).abs().max() > 100 * eps


def test_a_plan_of_another_model_is_refused():
    plan = PruningPlan.build(calibrate(tiny_model("qwen2_moe"), calibration_data(16)), HeaprConfig())
    model = tiny_model("qwen3_moe")
    with pytest.raises(HeaprError, match="plan"), masked(model, plan):
        pass


def test_compensation_is_not_left_out_in_silence():
    model = tiny_model()
    statistics = calibrate(model, calibration_data(16, 16), gram=True)
    plan = PruningPlan.build(statistics, HeaprConfig(compensate=True))
    with pytest.raises(HeaprError, match="statistics=None"), masked(model, plan):
        pass
