# Licensed under the Apache License, Version 2.0
"""Compensation when a plan is applied: what experts compute, what is reported, what is refused."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.checkpoints.saving import apply_streaming
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.surgery.apply import compensate_block
from optimum_heapr.text.samples import CalibrationData
from tests.helpers import plain_qwen3_moe


def tiny_model(seed=0) -> Qwen3MoeForCausalLM:
    return plain_qwen3_moe(width=16, seed=seed)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    return CalibrationData([torch.randint(0, 40, (32,), generator=generator) for _ in range(20)], "test", 0, 32)


@pytest.fixture(scope="module")
def statistics(model, data):
    return calibrate(model, data, 4, gram=True)


def pruned(model, statistics, **options):
    pruner = HeaprPruner(copy.deepcopy(model), config=HeaprConfig(**options))
    pruner.statistics = statistics
    pruner.prune()
    return pruner


@torch.no_grad()
def block_errors(dense, other, data):
    """Relative squared error of each block's output on the calibration tokens, given the inputs of the dense block."""
    errors = []
    for path in (block.path for block in find_expert_blocks(dense)):
        calls = []
        hook = dense.get_submodule(path).register_forward_hook(
            lambda _, inputs, output: calls.append((inputs, output))
        )
        for sample in data.samples:
            dense(input_ids=sample[None])
        hook.remove()
        lost = sum((other.get_submodule(path)(*inputs) - output).square().sum() for inputs, output in calls)
        errors.append(float(lost / sum(output.square().sum() for _, output in calls)))
    return errors


@pytest.mark.parametrize("criterion", ["heapr", "obs"])
@pytest.mark.parametrize("allocation", ["global", "layer", "uniform"])
def test_blocks_come_closer_to_the_unpruned_ones(model, statistics, data, criterion, allocation):
    options = {"ratio": 0.5, "criterion": criterion, "allocation": allocation}
    plain = pruned(model, statistics, **options)
    compensated = pruned(model, statistics, compensate=True, **options)
    assert plain.applied_plan.widths == compensated.applied_plan.widths
    errors = zip(block_errors(model, plain.model, data), block_errors(model, compensated.model, data))
    assert all(after < before for before, after in errors)
    for path, width in plain.applied_plan.widths.items():
        gates = [other.model.get_submodule(path).gate_up_proj for other in (plain, compensated)]
        assert torch.equal(*gates)
        report = compensated.applied_plan.compensation[path]
        assert len(report) == len(width) and all(after <= before for before, after in report)
    assert plain.applied_plan.compensation == {}


def test_the_report_travels_with_the_plan(model, statistics, tmp_path):
    pruner = pruned(model, statistics, ratio=0.5, compensate=True)
    pruner.save_pretrained(tmp_path / "pruned")
    plan = PruningPlan.load(tmp_path / "pruned")
    for path, report in pruner.applied_plan.compensation.items():
        assert [tuple(pair) for pair in plan.compensation[path]] == report


def test_nothing_removed_changes_nothing(model, statistics):
    changed = copy.deepcopy(model)
    for block in find_expert_blocks(changed):
        errors = compensate_block(block, [torch.arange(16)] * 4, statistics.blocks[block.path], 0.01)
        assert errors == [(0.0, 0.0)] * 4
    for name, weight in model.state_dict().items():
        assert torch.equal(changed.state_dict()[name], weight)


def test_statistics_from_a_file(model, statistics, tmp_path):
    statistics.save(tmp_path / "statistics.safetensors")
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=0.5, compensate=True))
    plan.save(tmp_path / "plan.safetensors")
    pruner = HeaprPruner(copy.deepcopy(model))
    again = pruner.apply(tmp_path / "plan.safetensors", tmp_path / "statistics.safetensors")
    expected = pruned(model, statistics, ratio=0.5, compensate=True).model
    for name, weight in expected.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


@pytest.mark.parametrize("layout", ["variable", "uniform", "padded"])
def test_cut_file_by_file(model, statistics, tmp_path, layout):
    model.save_pretrained(tmp_path / "model")
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=0.5, criterion="obs", compensate=True, layout=layout))
    plan.save(tmp_path / "plan.safetensors")
    apply_streaming(tmp_path / "model", tmp_path / "plan.safetensors", tmp_path / "out", statistics=statistics)
    pruner = HeaprPruner(copy.deepcopy(model))
    pruner.apply(plan, statistics)
    pruner.save_pretrained(tmp_path / "expected")
    streamed, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert streamed.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(streamed[name], weight, rtol=1e-4, atol=1e-5)
    report = PruningPlan.load(tmp_path / "out").compensation
    for path, experts in plan.compensation.items():
        for pair, other in zip(report[path], experts, strict=True):
            assert pair == pytest.approx(other, rel=1e-3, abs=1e-6)
    with pytest.raises(HeaprError, match="compensate=True and statistics=None"):
        apply_streaming(tmp_path / "model", plan, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_missing_statistics_are_refused_before_anything_is_cut(model, statistics, tmp_path):
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=0.5, compensate=True))
    untouched = copy.deepcopy(model)
    with pytest.raises(HeaprError, match="compensate=True and statistics=None"):
        HeaprPruner(untouched).apply(plan)
    statistics.save(tmp_path / "vectors.safetensors", grams=False)
    with pytest.raises(HeaprError, match="compensate=True: needs second-order.*statistics='gram'"):
        HeaprPruner(untouched).apply(plan, tmp_path / "vectors.safetensors")
    for name, weight in model.state_dict().items():
        assert torch.equal(untouched.state_dict()[name], weight)


def test_statistics_of_another_model_are_refused(model, statistics, data):
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=0.5, compensate=True))
    other = calibrate(tiny_model(seed=5), data, 4, gram=True)
    with pytest.raises(HeaprError, match="plan: made for a model with"):
        HeaprPruner(copy.deepcopy(model)).apply(plan, other)


def test_one_line_is_all_it_takes(model, data):
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": [sample.tolist() for sample in data.samples]})
    pruner = HeaprPruner(copy.deepcopy(model), config=HeaprConfig(ratio=0.5, criterion="obs", compensate=True))
    pruner.calibrate(rows)
    result = pruner.prune()
    assert pruner.applied_plan.ratio == pytest.approx(0.5)
    assert torch.isfinite(result(input_ids=data.samples[0][None]).logits).all()
