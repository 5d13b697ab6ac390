# Licensed under the Apache License, Version 2.0
"""Experts as linear layers: the same function, the same checkpoint, and exact both ways."""

import warnings

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.modeling.atomic_experts import AtomicExperts
from optimum_heapr.modeling.linear_experts import LinearExperts
from optimum_heapr.modeling.unquantized import warn_of_unquantized_experts
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


def test_what_has_no_such_form_is_refused():
    with pytest.raises(HeaprError, match="has no experts of variable widths"):
        to_linear_experts(tiny_model("qwen3_moe"))
    with pytest.raises(HeaprError, match="has biases"):
        to_linear_experts(pruned("gpt_oss"))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_quantizer_that_passed_over_packed_experts_is_named(model_type):
    """With real ones in `test_quantizers.py`."""
    model = pruned(model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unquantized_experts(model)
    model.config.quantization_config = {"quant_method": "four-bits"}
    with pytest.warns(
        UserWarning, match="^quantized by four-bits, but the routed experts, ..% of the bytes, are in float32"
    ) as said:
        warn_of_unquantized_experts(model)
    # There is no other form of experts with biases.
    assert ('experts_as="linear"' in str(said[0].message)) == (model_type == "qwen3_moe")
    if model_type == "qwen3_moe":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_unquantized_experts(to_linear_experts(model))
