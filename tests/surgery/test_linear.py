# Licensed under the Apache License, Version 2.0
"""Experts as linear layers: the same function, the same checkpoint, exact both ways, and seen by what looks for such layers."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_heapr import HeaprConfig, HeaprError, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.surgery.apply import apply_plan
from optimum_heapr.surgery.linear import from_linear_experts, to_linear_experts
from tests.helpers import calibration_data, random_ids, tiny_model


def pruned(model_type: str) -> nn.Module:
    model = tiny_model(model_type)
    plan = PruningPlan.build(calibrate(model, calibration_data(24, 24)), HeaprConfig(ratio=0.4))
    next(iter(plan.kept.values()))[1] = torch.empty(0, dtype=torch.int64)
    return apply_plan(model, plan)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=random_ids()).logits


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek"])
def test_there_and_back(model_type, tmp_path):
    model = pruned(model_type)
    before, expected = {n: p.clone() for n, p in model.named_parameters()}, logits(model)
    storages = {p.untyped_storage().data_ptr() for n, p in model.named_parameters() if "experts" in n}
    model.save_pretrained(tmp_path / "packed")

    assert to_linear_experts(model) is model
    linear = {n: p for n, p in model.named_parameters() if ".experts." in n}
    of_pairs = [p for n, p in linear.items() if p.numel() and not n.endswith(("down_proj.weight", "w2.weight"))]
    assert {p.untyped_storage().data_ptr() for p in of_pairs} <= storages
    assert sum(isinstance(m, nn.Linear) for n, m in model.named_modules() if ".experts." in n) == len(linear) == 36
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "linear")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("packed", "linear")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "linear")), expected)

    from_linear_experts(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert before.keys() == dict(model.named_parameters()).keys() and torch.equal(logits(model), expected)


def test_adapters_on_all_linear_layers_reach_each_expert(tmp_path):
    base = to_linear_experts(pruned("qwen3_moe"))
    start = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum(".experts." in name for name in trained) == 2 * 36
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model(input_ids=random_ids(), labels=random_ids()).loss.backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if ".experts." in n) > 36
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(start, tmp_path).eval()), expected)
    with pytest.raises(HeaprError, match="merge adapters first"):
        from_linear_experts(copy.deepcopy(model))
    torch.testing.assert_close(logits(from_linear_experts(model.merge_and_unload())), expected, atol=1e-4, rtol=1e-4)


def test_what_has_no_such_form_is_refused():
    with pytest.raises(HeaprError, match="has no experts of variable widths"):
        to_linear_experts(tiny_model("qwen3_moe"))
    with pytest.raises(HeaprError, match="has biases"):
        to_linear_experts(pruned("gpt_oss"))
