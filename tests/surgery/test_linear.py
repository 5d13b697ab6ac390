# Licensed under the Apache License, Version 2.0
"""Experts as linear layers: the same function, the same checkpoint, exact both ways, and seen by what looks for such layers."""

import copy
import re
import warnings

import peft
import pytest
import torch
from datasets import Dataset
from packaging.version import parse
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.modeling.atomic_experts import AtomicExperts
from optimum_heapr.modeling.linear_experts import LinearExperts
from optimum_heapr.surgery.apply import apply_plan
from optimum_heapr.surgery.linear import from_linear_experts, to_linear_experts
from tests.helpers import calibration_data, random_ids, tiny_model


def pruned(model_type: str) -> nn.Module:
    model = tiny_model(model_type)
    plan = PruningPlan.build(calibrate(model, calibration_data(24, 24)), HeaprConfig(ratio=0.4))
    next(iter(plan.kept.values()))[1] = torch.empty(0, dtype=torch.int64)
    return apply_plan(model, plan)


@pytest.fixture(scope="module")
def packed() -> nn.Module:
    """Not to be changed: tests take copies."""
    return pruned("qwen3_moe")


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
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), expected)

    from_linear_experts(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert before.keys() == dict(model.named_parameters()).keys() and torch.equal(logits(model), expected)


def experts_of(model) -> set[type]:
    return {type(model.get_submodule(path)) for path in model.config.expert_widths}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek"])
def test_a_checkpoint_loads_in_either_form(model_type, tmp_path):
    """Forms of one family side by side, each saved after the other was made: transformers knows one reading for both."""
    packed = pruned(model_type)
    expected = logits(packed)
    packed.save_pretrained(tmp_path / "packed")
    linear, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", experts_as="linear", output_loading_info=True
    )
    assert not any(info.values()) and experts_of(linear) == {LinearExperts}
    torch.testing.assert_close(logits(linear), expected, atol=1e-5, rtol=1e-5)
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "packed again")
    linear.save_pretrained(tmp_path / "linear")
    packed.save_pretrained(tmp_path / "packed at last")
    files = [load_file(folder / "model.safetensors") for folder in sorted(tmp_path.iterdir())]
    assert len(files) == 4
    for file in files[1:]:
        assert file.keys() == files[0].keys()
        assert all(torch.equal(tensor, files[0][name]) for name, tensor in file.items())
    for folder in tmp_path.iterdir():
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert experts_of(loaded) == {LinearExperts if folder.name == "linear" else AtomicExperts}
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "linear", experts_as="packed")
    assert experts_of(loaded) == {AtomicExperts} and torch.equal(logits(loaded), expected)


def test_a_form_that_is_none_is_named(tmp_path):
    pruned("qwen3_moe").save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="experts_as='flat': must be 'packed' or 'linear'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_as="flat")
    pruned("qwen3_moe").save_pretrained(tmp_path / "together", save_original_format=False)
    with pytest.raises(
        ValueError, match="experts_as='linear': this checkpoint stores the experts of a layer together"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "together", experts_as="linear")
    pruned("gpt_oss").save_pretrained(tmp_path / "biases")
    with pytest.raises(ValueError, match="experts_as='linear': experts of this family have biases"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "biases", experts_as="linear")


@pytest.mark.parametrize("memory", ["plain", "streaming"])
def test_it_is_written_in_the_form_that_is_asked_for(memory, tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    config = HeaprConfig(ratio=0.4, num_samples=2, seq_length=24, eval_samples=0)
    pruner = HeaprPruner.from_pretrained(tmp_path / "model", config, memory=memory)
    pruner.calibrate(Dataset.from_dict({"input_ids": random_ids(2, 24).tolist()}))
    pruner.apply(pruner.plan())
    for form, kind in (("linear", LinearExperts), ("packed", AtomicExperts)):
        folder = pruner.save_pretrained(tmp_path / form, experts_as=form)
        assert experts_of(AutoModelForCausalLM.from_pretrained(folder)) == {kind}
    with pytest.raises(HeaprError, match="experts_as='liner': must be 'packed' or 'linear'; did you mean \"linear\""):
        pruner.save_pretrained(tmp_path / "out", experts_as="liner")
    assert not (tmp_path / "out").exists()


def test_stock_layouts_have_one_form(tmp_path):
    pruner = HeaprPruner(tiny_model("qwen3_moe"), config=HeaprConfig(layout="uniform", ratio=0.4, eval_samples=0))
    pruner.calibrate(Dataset.from_dict({"input_ids": random_ids(4, 24).tolist()}))
    pruner.apply(pruner.plan())
    with pytest.raises(HeaprError, match="experts_as='linear': is for layout='variable', and this is 'uniform'"):
        pruner.save_pretrained(tmp_path / "out", experts_as="linear")
    pruner.save_pretrained(tmp_path / "out", experts_as="packed")
    assert "experts_as" not in (tmp_path / "out" / "config.json").read_text()


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


LEFT_OUT = "adapters reach .* layers and none of the routed experts"


@pytest.mark.parametrize(
    ("targets", "warns"),
    [
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]}, True),
        ({"target_modules": r".*\.(q_proj|gate_proj)"}, True),
        ({"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["experts"]}, False),
    ],
)
def test_adapters_that_leave_packed_experts_out_say_so(targets, warns, packed, tmp_path):
    model = copy.deepcopy(packed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = get_peft_model(model, LoraConfig(r=2, **targets))
    found = [str(one.message) for one in said if re.match(LEFT_OUT, str(one.message))]
    assert len(found) == warns
    share = sum(p.numel() for n, p in packed.named_parameters() if ".experts." in n) / packed.num_parameters()
    assert not warns or f"{share:.0%} of the parameters" in found[0] and 'experts_as="linear"' in found[0]
    adapted.save_pretrained(tmp_path)
    with warnings.catch_warnings():  # what is loaded to be used as it is was told when it was made
        warnings.filterwarnings("error", LEFT_OUT)
        PeftModel.from_pretrained(copy.deepcopy(packed), tmp_path)


@pytest.mark.skipif(
    parse(peft.__version__) < parse(MIN_PEFT_VERSION),
    reason=f"this transformers takes adapters from peft {MIN_PEFT_VERSION} on",
)
def test_adapters_by_transformers_say_so_too_and_linear_experts_give_no_reason(packed):
    with pytest.warns(UserWarning, match=LEFT_OUT):
        copy.deepcopy(packed).add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    linear = to_linear_experts(copy.deepcopy(packed))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", LEFT_OUT)
        linear.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    assert sum(".experts." in name for name, p in linear.named_parameters() if p.requires_grad) == 2 * 36


def test_what_has_no_such_form_is_refused():
    with pytest.raises(HeaprError, match="has no experts of variable widths"):
        to_linear_experts(tiny_model("qwen3_moe"))
    with pytest.raises(HeaprError, match="has biases"):
        to_linear_experts(pruned("gpt_oss"))
