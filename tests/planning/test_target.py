# Licensed under the Apache License, Version 2.0
"""A number of parameters, or of bytes, in place of a ratio."""

import pytest
import torch
from safetensors.torch import load_file

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from tests.helpers import calibration_data, random_statistics, tiny_model


# 2 blocks of 4 experts of 8 atomic experts, 96 parameters each, in a model of 10,000.
ROUTED = 2 * 4 * 8 * 96


@pytest.mark.parametrize("target", [9_999, 9_900, 7_000, 10_000 - ROUTED + 96])
def test_the_most_that_is_no_more_than_asked_for(target):
    plan = PruningPlan.build(random_statistics(), HeaprConfig(ratio=0.9, target_parameters=target))
    left = 10_000 - plan.removed * 96
    assert target - 96 < left <= target
    assert PruningPlan.build(random_statistics(), plan.config).removed == plan.removed


def test_a_ratio_beside_a_target_is_said_not_to_be_used(heapr_log):
    plan = PruningPlan.build(random_statistics(), HeaprConfig(target_parameters=8_000))
    PruningPlan.build(random_statistics(), HeaprConfig.from_dict(plan.config.to_dict()))
    PruningPlan.build(random_statistics(), plan.config.replace(ratio=0.4))
    assert not heapr_log.messages
    assert PruningPlan.build(random_statistics(), plan.config.replace(seed=1)).config.ratio == plan.config.ratio
    PruningPlan.build(random_statistics(), HeaprConfig(ratio=0.4, target_parameters=8_000))
    message = f"ratio=0.4 is not used: target_parameters=8,000 is given as well, and asks for {plan.config.ratio:.4f}"
    assert set(heapr_log.messages) == {message}


def test_widths_that_cannot_hit_it_stay_above():
    plan = PruningPlan.build(random_statistics(), HeaprConfig(target_parameters=8_000, width_multiple=4))
    left = 10_000 - plan.removed * 96
    assert 8_000 <= left < 8_000 + 4 * 96


@pytest.mark.parametrize("target", [1, 10_000 - ROUTED, 10_000, 20_000])
def test_what_cannot_be_is_refused(target):
    with pytest.raises(HeaprError, match=f"target_parameters={target:,}.*{10_000 - ROUTED:,}.*10,000"):
        PruningPlan.build(random_statistics(), HeaprConfig(target_parameters=target))


def test_layers_that_are_protected_leave_the_others_to_reach_it():
    path = next(iter(random_statistics().blocks))
    config = HeaprConfig(target_parameters=8_000, allocation="layer", protect=path)
    plan = PruningPlan.build(random_statistics(), config)
    assert 8_000 - 96 < 10_000 - plan.removed * 96 <= 8_000
    assert sum(plan.widths[path]) == 4 * 8
    assert PruningPlan.build(random_statistics(), plan.config).removed == plan.removed
    least = 10_000 - ROUTED // 2
    with pytest.raises(HeaprError, match=f"target_parameters=6,000: protect='{path}' leaves {least:,} at least"):
        PruningPlan.build(random_statistics(), config.replace(target_parameters=6_000))


# Bytes


@pytest.mark.parametrize(("size", "parameters"), [("18KB", 9_000), (14_000, 7_000), ("19.0 kB", 9_500)])
def test_bytes_are_parameters_times_their_size(size, parameters):
    plan = PruningPlan.build(random_statistics(), HeaprConfig(ratio=0.9, target_size=size))
    assert plan.removed == PruningPlan.build(random_statistics(), HeaprConfig(target_parameters=parameters)).removed


def test_bytes_that_cannot_be_are_refused():
    with pytest.raises(HeaprError, match=r"target_size='1GB': must lie between 7,712 bytes.*20,000 bytes"):
        PruningPlan.build(random_statistics(), HeaprConfig(target_size="1GB"))


def test_statistics_that_do_not_know_the_bytes_are_refused():
    statistics = random_statistics()
    del statistics.fingerprint["storage"]
    with pytest.raises(HeaprError, match="target_size='18KB'.*calibrate again, or use target_parameters"):
        PruningPlan.build(statistics, HeaprConfig(target_size="18KB"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_what_is_saved_has_that_size(model_type, dtype, tmp_path):
    model = tiny_model(model_type, dtype=dtype)
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    pruner = HeaprPruner(model, config=HeaprConfig(target_size=int(0.9 * whole)))
    pruner.statistics = calibrate(model, calibration_data(16, 16))
    pruner.apply(pruner.plan())
    pruner.save_pretrained(tmp_path / "pruned")
    tensors = load_file(tmp_path / "pruned" / "model.safetensors").values()
    saved = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_floating_point())
    each = pruner.statistics.fingerprint["storage"]["bytes_per_atomic_expert"]
    assert 0.9 * whole - each < saved <= 0.9 * whole + 1
