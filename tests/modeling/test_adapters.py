# Licensed under the Apache License, Version 2.0
"""Adapters on experts: one for each where they are linear layers, and said where there is none, or one for all."""

import copy
import re
import warnings

import peft
import pytest
import torch
from packaging.version import parse
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from optimum_heapr import HeaprConfig, HeaprError, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.surgery.apply import apply_plan
from optimum_heapr.surgery.linear import from_linear_experts, to_linear_experts
from tests.helpers import calibration_data, random_ids, tiny_model


EXPERTS = ["gate_proj", "up_proj", "down_proj"]
PACKED = ["experts.gate_up_proj", "experts.down_proj"]
takes_adapters = pytest.mark.skipif(
    parse(peft.__version__) < parse(MIN_PEFT_VERSION),
    reason=f"this transformers takes adapters from peft {MIN_PEFT_VERSION} on",
)


@pytest.fixture(scope="module")
def packed() -> nn.Module:
    """Not to be changed: tests take copies. Widths differ, and one is 0."""
    model = tiny_model("qwen3_moe")
    plan = PruningPlan.build(calibrate(model, calibration_data(24, 24)), HeaprConfig(ratio=0.4))
    next(iter(plan.kept.values()))[1] = torch.empty(0, dtype=torch.int64)
    return apply_plan(model, plan)


def linear(packed: nn.Module) -> nn.Module:
    return to_linear_experts(copy.deepcopy(packed))


def adapted(model: nn.Module, **targets) -> nn.Module:
    """With an adapter that changes something, of rank 2 and weight 4."""
    model = get_peft_model(model, LoraConfig(r=2, **targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=random_ids()).logits


def test_adapters_on_all_linear_layers_reach_each_expert(packed):
    """And what is merged is `W + B A lora_alpha / r` of each expert, in the packed form again."""
    base = linear(packed)
    model = adapted(base, target_modules=EXPERTS)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum(".experts." in name for name in trained) == 2 * 36
    model(input_ids=random_ids(), labels=random_ids()).loss.backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if ".experts." in n) > 36
    expected = logits(model)
    updates = {
        path.removeprefix("base_model.model."): 4 * module.lora_B["default"].weight @ module.lora_A["default"].weight
        for path, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    with pytest.raises(HeaprError, match="merge adapters first"):
        from_linear_experts(copy.deepcopy(model))
    merged = from_linear_experts(model.merge_and_unload())
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    before = dict(linear(packed).named_parameters())
    for name, parameter in to_linear_experts(merged).named_parameters():
        update = updates.pop(name.removesuffix(".weight"), 0)
        torch.testing.assert_close(parameter, before[name] + update, atol=1e-6, rtol=1e-6)
    assert not updates


@pytest.mark.parametrize("trained_on", ["linear", "packed"])
def test_an_adapter_of_the_other_form_is_refused(trained_on, packed, tmp_path):
    """PEFT would load what it has for attention, and say nothing of the experts."""
    forms = {"linear": linear(packed), "packed": copy.deepcopy(packed)}
    targets = {"linear": {"target_modules": ["q_proj", *EXPERTS]}}
    targets["packed"] = {"target_modules": ["q_proj"], "target_parameters": PACKED}
    adapted(forms.pop(trained_on), **targets[trained_on]).save_pretrained(tmp_path)
    (other,) = forms.values()
    reason = f'the adapter was trained on experts in the form "{trained_on}".*experts_as="{trained_on}"'
    with pytest.raises(RuntimeError, match=reason):
        PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    if parse(peft.__version__) >= parse(MIN_PEFT_VERSION):
        with pytest.raises(ValueError, match=reason):
            other.load_adapter(tmp_path)


LEFT_OUT = "adapters reach .* layers and none of the routed experts"
TOGETHER = "adapters of packed experts: one update of low rank for all experts of a layer together, up to 6; load"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ({"target_modules": "all-linear"}, LEFT_OUT),
        ({"target_modules": ["q_proj", "v_proj", *EXPERTS]}, LEFT_OUT),
        ({"target_modules": r".*\.(q_proj|gate_proj)"}, LEFT_OUT),
        ({"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, TOGETHER),
        ({"target_modules": [], "target_parameters": PACKED}, TOGETHER),
        ({"target_modules": ["q_proj"], "modules_to_save": ["experts"]}, None),
    ],
)
def test_what_adapters_do_not_do_for_each_expert_is_said(targets, expected, packed, tmp_path):
    model = copy.deepcopy(packed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapter = get_peft_model(model, LoraConfig(r=2, **targets))
    (found,) = [str(one.message) for one in said if re.match("adapters ", str(one.message))] or [None]
    assert found is expected or re.match(expected, found) and 'experts_as="linear"' in found
    if expected is LEFT_OUT:
        share = sum(p.numel() for n, p in packed.named_parameters() if ".experts." in n) / packed.num_parameters()
        assert f"{share:.0%} of the parameters" in found
    adapter.save_pretrained(tmp_path)
    with warnings.catch_warnings():  # what is loaded to be used as it is was told when it was made
        warnings.filterwarnings("error", "adapters ")
        PeftModel.from_pretrained(copy.deepcopy(packed), tmp_path)


@takes_adapters
def test_adapters_by_transformers_say_so_too_and_linear_experts_give_no_reason(packed):
    with pytest.warns(UserWarning, match=LEFT_OUT):
        copy.deepcopy(packed).add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    model = linear(packed)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "adapters ")
        model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    assert sum(".experts." in name for name, p in model.named_parameters() if p.requires_grad) == 2 * 36
