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
    plan = PruningPlan.build(random_statistics(), HeaprConfig(target_parameters=target))
    left = 10_000 - plan.removed * 96
    assert target - 96 < left <= target
    assert PruningPlan.build(random_statistics(), plan.config).removed == plan.removed


def test_a_plan_holds_what_was_asked_for_and_the_ratio_is_what_was_reached(tmp_path):
    plan = PruningPlan.build(random_statistics(), HeaprConfig(target_parameters=8_000))
    plan.save(tmp_path / "plan.safetensors")
    for config in (plan.config, PruningPlan.load(tmp_path / "plan.safetensors").config):
        assert config.goal == ("target_parameters", 8_000) and config.ratio is None
    assert plan.ratio == 21 / 64  # 2,000 parameters are 20.8 atomic experts
    assert PruningPlan.build(random_statistics(), plan.config.replace(ratio=0.5)).ratio == 0.5
    assert PruningPlan.build(random_statistics(seed=1), plan.config.replace(seed=1)).ratio == 21 / 64


def test_a_plan_of_an_earlier_version_is_read(tmp_path):
    """It held the ratio reached beside the target."""
    plan = PruningPlan.build(random_statistics(), HeaprConfig(target_parameters=8_000))
    plan.config.ratio = plan.ratio
    plan.save(tmp_path / "plan.safetensors")
    loaded = PruningPlan.load(tmp_path / "plan.safetensors")
    assert loaded.config == HeaprConfig(target_parameters=8_000) and loaded.removed == plan.removed


# What widths hold back

WIDE = {"blocks": 2, "experts": 3, "width": 24}  # in a model of 24,000 parameters, 13,824 of them routed


def wide_statistics(width: int = 24):
    statistics = random_statistics(**{**WIDE, "width": width})
    statistics.fingerprint["model"]["num_parameters"] = 24_000
    statistics.fingerprint["storage"] = {"num_bytes": 48_000, "bytes_per_atomic_expert": 192}
    return statistics


@pytest.mark.parametrize("target", [23_900, 20_000, 17_111])
@pytest.mark.parametrize(
    ("step", "options"),
    [
        (1, {"allocation": "global"}),
        (1, {"allocation": "global", "min_width": 5}),
        (1, {"allocation": "global", "protect": "model.layers.0.mlp.experts:1"}),
        (4, {"allocation": "global", "width_multiple": 4}),
        (2, {"allocation": "layer"}),  # one of each layer
        (8, {"allocation": "layer", "width_multiple": 4, "protect": "model.layers.0.mlp.experts:0"}),
        (6, {"allocation": "uniform"}),  # one of each expert
        (6 * 8, {"layout": "uniform"}),
        (6 * 6, {"layout": "uniform", "tensor_parallel": 2, "width_multiple": 3, "width": 36}),
        (6 * 12, {"layout": "uniform", "width_multiple": 3, "align_for": "none", "target": "bytes", "width": 36}),
    ],
)
def test_what_widths_cannot_hit_stays_below_and_by_one_step_at_most(step, options, target):
    options = dict(options)
    statistics = wide_statistics(options.pop("width", 24))
    in_bytes = options.pop("target", None) == "bytes"
    config = HeaprConfig(**({"target_size": 2 * target} if in_bytes else {"target_parameters": target}), **options)
    left = 24_000 - PruningPlan.build(statistics, config).removed * 96
    assert target - step * 96 < left <= target


def test_a_last_group_that_is_cut_short_counts_for_what_it_is():
    """Groups of 5 of a width of 24 leave one of 4."""
    statistics = wide_statistics()
    for target in range(17_000, 23_900, 96):
        plan = PruningPlan.build(statistics, HeaprConfig(target_parameters=target, width_multiple=5))
        assert target - 5 * 96 < 24_000 - plan.removed * 96 <= target
        uniform = PruningPlan.build(
            statistics, HeaprConfig(target_parameters=target, width_multiple=5, allocation="uniform")
        )
        assert target - 6 * 5 * 96 < 24_000 - uniform.removed * 96 <= target


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"layout": "uniform"},
            r"\(ratio=0\.7639\): leaves fewer than 8 of 24 atomic experts; the largest ratio is 0\.6667",
        ),
        (
            {"allocation": "uniform", "min_width": 9},
            r"min_width=9: target_parameters=13500 \(ratio=0\.7639\) leaves width 5",
        ),
        ({"min_width": 9}, r"\(ratio=0\.7639\): min_width=9, .* leave only 0\.6250 to remove"),
        ({"protect": "*.0.*"}, r"\(ratio=0\.7639\): .*protect='\*\.0\.\*' .* leave only 0\.5000 to remove"),
    ],
)
def test_a_target_that_no_width_gives_is_refused(options, expected):
    with pytest.raises(HeaprError, match=expected):
        PruningPlan.build(wide_statistics(), HeaprConfig(target_parameters=13_500, **options))


@pytest.mark.parametrize("target", [1, 10_000 - ROUTED, 10_000, 20_000])
def test_what_cannot_be_is_refused(target):
    with pytest.raises(HeaprError, match=f"target_parameters={target}: .*{10_000 - ROUTED:,}.*10,000"):
        PruningPlan.build(random_statistics(), HeaprConfig(target_parameters=target))


def test_layers_that_are_protected_leave_the_others_to_reach_it():
    path = next(iter(random_statistics().blocks))
    config = HeaprConfig(target_parameters=8_000, allocation="layer", protect=path)
    plan = PruningPlan.build(random_statistics(), config)
    assert 8_000 - 96 < 10_000 - plan.removed * 96 <= 8_000
    assert sum(plan.widths[path]) == 4 * 8
    assert PruningPlan.build(random_statistics(), plan.config).removed == plan.removed
    least = 10_000 - ROUTED // 2
    with pytest.raises(HeaprError, match=f"target_parameters=6000: protect='{path}' leaves {least:,} at least"):
        PruningPlan.build(random_statistics(), config.replace(target_parameters=6_000))


# Bytes


@pytest.mark.parametrize(("size", "parameters"), [("18KB", 9_000), (14_000, 7_000), ("19.0 kB", 9_500)])
def test_bytes_are_parameters_times_their_size(size, parameters):
    plan = PruningPlan.build(random_statistics(), HeaprConfig(target_size=size))
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


@pytest.mark.parametrize("option", ["target_size", "target_parameters"])
@pytest.mark.parametrize(
    ("model_type", "layout", "fills_up"),
    [("qwen3_moe", "uniform", False), ("deepseek_v2", "uniform", True), ("qwen3_moe", "padded", True)],
)
def test_zeros_that_a_stock_layout_stores_above_the_target_are_said(
    model_type, layout, fills_up, option, tmp_path, heapr_log
):
    model = tiny_model(model_type)
    whole = sum(parameter.numel() for parameter in model.parameters())
    unit = {"target_size": 4, "target_parameters": 1}[option]
    target = int(0.9 * whole) * unit
    pruner = HeaprPruner(model, config=HeaprConfig(**{option: target}, layout=layout))
    pruner.statistics = calibrate(model, calibration_data(16, 16))
    pruner.apply(pruner.plan())
    saved = unit * sum(parameter.numel() for parameter in pruner.model.parameters())
    said = list({message for message in heapr_log.messages if "fills experts up with zeros" in message})
    assert len(said) == int(fills_up) == int(saved > target)
    assert not said or f" {saved:,} " in said[0]
