# Licensed under the Apache License, Version 2.0
"""The number of experts that `auto` chooses: what it measures, against fits of its own, in memory and streaming."""

import copy

import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprPruner, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.cli.tables import plan_table
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.surgery.apply import apply_plan
from optimum_heapr.surgery.rectangles import HELD_OUT
from optimum_heapr.text.samples import CalibrationData
from tests.helpers import calibration_data, tiny_model


OPTIONS = {"layout": "uniform", "ratio": 0.5, "compensate": True, "compensation_scope": "block", "batch_size": 8}


def pruner_of(model, data) -> HeaprPruner:
    pruner = HeaprPruner(model, config=HeaprConfig(num_experts="auto", seq_length=24, **OPTIONS))
    pruner.statistics, pruner.calibration_data = calibrate(model, data, batch_size=8), data
    return pruner


@pytest.fixture(scope="module")
def data():
    return calibration_data(*(24,) * 32)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3_moe", num_experts=8, moe_intermediate_size=12)


@pytest.fixture(scope="module")
def pruner(model, data):
    return pruner_of(model, data)


@pytest.fixture(scope="module")
def plan(pruner):
    pruner.check()
    return pruner.plan()


def test_experts_that_no_token_gets_go_and_the_others_stay_whole(data):
    model = tiny_model("gpt_oss", num_local_experts=8)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias[4:] -= 100
    plan = pruner_of(model, data).plan()
    assert set(map(tuple, plan.dropped.values())) == {(4, 5, 6, 7)} and plan.config.num_experts == "4"
    increases = {(point["experts"], point["width"]): point["increase"] for point in plan.rectangles}
    assert list(increases) == [(8, 6), (6, 8), (5, 9), (4, 12)]
    assert sorted(increases.values(), reverse=True) == list(increases.values())
    assert increases[4, 12] < 1e-6 * increases[8, 6]
    assert "num_experts auto: 4 experts of width 12" in plan_table(plan)


def test_narrow_experts_stay_where_each_is_needed(plan):
    best = min(plan.rectangles, key=lambda point: point["increase"])
    assert (best["experts"], best["width"]) == (8, 6) and plan.config.num_experts == "8" and plan.dropped == {}


def test_less_than_asked_is_said(pruner, heapr_log):
    pruner.plan()
    assert not heapr_log.records
    plan = pruner.plan(ratio=0.6, width_multiple=6)
    assert plan.ratio == 0.5
    assert "50.00 % go where ratio=0.6 was asked" in heapr_log.text and "rounded up to a multiple" in heapr_log.text


def test_the_plan_is_that_of_the_number(plan, pruner, tmp_path):
    named = PruningPlan.build(pruner.statistics, plan.config)
    assert named.kept.keys() == plan.kept.keys() and named.widths == plan.widths
    plan.save(tmp_path / "plan.safetensors")
    assert PruningPlan.load(tmp_path / "plan.safetensors").rectangles == plan.rectangles


@torch.no_grad()
def test_the_error_is_that_of_a_fit_to_the_other_tokens(plan, pruner, model, data):
    """Cut by a fit to seven eighths of the text, the routed output on the rest is as far off as was measured."""
    first = len(data.samples) - len(data.samples) // HELD_OUT
    early = CalibrationData(data.samples[:first], "early", 0, 24)
    point = plan.rectangles[0]
    config = HeaprConfig(num_experts=None, seq_length=24, **{**OPTIONS, "ratio": 1 - point["width"] / 12})
    other = apply_plan(copy.deepcopy(model), PruningPlan.build(pruner.statistics, config), data=early)
    other.set_experts_implementation("eager")  # six floats are no rows for the grouped kernel
    increase, tokens = 0.0, (len(data.samples) - first) * 24
    for block in find_expert_blocks(model):
        lost = energy = 0.0
        measured = pruner.statistics.blocks[block.path]
        calls = []
        handle = block.module.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
        for sample in data.samples:
            model(input_ids=sample[None])
        handle.remove()
        for number, (inputs, output) in enumerate(calls):
            hidden, index, weight = inputs
            if number >= first:
                lost += float((other.get_submodule(block.path)(*inputs) - output).square().sum())
            for expert in range(8):
                token, slot = torch.where(index == expert)
                gate, up = block.gate_up_rows(expert) @ hidden[token].T
                atoms = torch.nn.functional.silu(gate) * up * weight[token, slot]  # [I, n]
                energy += float((atoms.square().sum(1) * block.down_rows(expert).square().sum(1)).sum())
        felt = 0.5 * (measured.activation_sq_sum * measured.mean("gradient_sq_sum")).sum()
        increase += float(felt) / energy * lost / tokens
    # The fit of the chooser has the ridge of all tokens.
    assert point["increase"] == pytest.approx(increase, rel=0.05)


def test_streaming_measures_the_same(plan, pruner, model, data, tmp_path):
    model.save_pretrained(tmp_path / "model")
    streaming = HeaprPruner.from_pretrained(tmp_path / "model", pruner.config, memory="streaming")
    streaming.calibration_data = data
    found = streaming.plan(pruner.statistics)
    assert found.dropped == plan.dropped
    for here, there in zip(found.rectangles, plan.rectangles, strict=True):
        assert here["increase"] == pytest.approx(there["increase"], rel=1e-3)
