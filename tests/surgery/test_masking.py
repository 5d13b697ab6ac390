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


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek"])
@torch.no_grad()
def test_a_masked_model_computes_what_the_pruned_one_does(family):
    model = tiny_model(family)
    with torch.enable_grad():
        plan = PruningPlan.build(calibrate(model, calibration_data(16, 16)), HeaprConfig(ratio=0.6))
    before, ids = copy.deepcopy(model.state_dict()), torch.arange(3, 19).unsqueeze(0)
    with pytest.raises(RuntimeError, match="something"), masked(model, plan):
        logits = model(input_ids=ids).logits
        raise RuntimeError("something")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    unpruned = model(input_ids=ids).logits
    pruned = apply_plan(model, plan)(input_ids=ids).logits
    # As many float32 roundings as sums have terms, relative to the largest number.
    eps = torch.finfo(torch.float32).eps * 64 * unpruned.abs().max()
    torch.testing.assert_close(logits, pruned, rtol=0, atol=float(eps))
    assert (logits - unpruned).abs().max() > 100 * eps


def test_a_plan_of_another_model_is_refused():
    plan = PruningPlan.build(calibrate(tiny_model("qwen2_moe"), calibration_data(16)), HeaprConfig())
    model = tiny_model("qwen3_moe")
    with pytest.raises(HeaprError, match="plan"), masked(model, plan):
        pass
