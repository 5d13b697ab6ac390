# Licensed under the Apache License, Version 2.0
"""A pruned model computes what the unpruned one computes with the removed columns of `down_proj` set to zero."""

import copy
import dataclasses
import functools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_heapr import AtomicStatistics, HeaprConfig, HeaprError, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.modeling.atomic_experts import AtomicExperts
from optimum_heapr.surgery.apply import apply_plan
from tests.helpers import calibration_data, random_ids, tiny_model


FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2")
IDS = random_ids(4, 20)


@functools.cache
def statistics_of(model_type: str) -> AtomicStatistics:
    return calibrate(tiny_model(model_type), calibration_data(24, 24, 24), batch_size=3)


def plan_of(model_type: str, **options) -> PruningPlan:
    return PruningPlan.build(statistics_of(model_type), HeaprConfig(**{"ratio": 0.4, **options}))


def emptied(plan: PruningPlan, **experts_by_block) -> PruningPlan:
    """The plan with whole experts removed: `block0=[1]` those of the first block."""
    kept = {path: list(experts) for path, experts in plan.kept.items()}
    for name, experts in experts_by_block.items():
        path = list(kept)[int(name.removeprefix("block"))]
        for expert in experts:
            kept[path][expert] = torch.empty(0, dtype=torch.int64)
    return dataclasses.replace(plan, kept=kept)


@torch.no_grad()
def zeroed(model: torch.nn.Module, plan: PruningPlan) -> torch.nn.Module:
    """The unpruned model with zeros where the plan removes; written without any of the package's code."""
    for path, experts in plan.kept.items():
        stock = model.get_submodule(path)
        for expert, kept in enumerate(experts):
            removed = [k for k in range(plan.original_width[path]) if k not in kept.tolist()]
            if stock.is_transposed:
                stock.down_proj[expert, removed, :] = 0
            else:
                stock.down_proj[expert, :, removed] = 0
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


PLANS = {
    "a quarter": lambda model_type: plan_of(model_type, ratio=0.25),
    "most": lambda model_type: plan_of(model_type, ratio=0.8, criterion="random"),
    "multiples": lambda model_type: plan_of(model_type, ratio=0.4, width_multiple=4),
    "layer": lambda model_type: plan_of(model_type, ratio=0.5, allocation="layer", criterion="magnitude"),
    "uniform": lambda model_type: plan_of(model_type, ratio=0.5, allocation="uniform"),
    "empty experts": lambda model_type: emptied(plan_of(model_type), block0=[0, 3], block1=[5]),
    "an empty layer": lambda model_type: emptied(plan_of(model_type), block0=range(6)),
    "nothing left": lambda model_type: emptied(plan_of(model_type), block0=range(6), block1=range(6)),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_equals_zeroed_columns(model_type, name):
    plan = PLANS[name](model_type)
    unpruned = logits(tiny_model(model_type))
    expected = logits(zeroed(tiny_model(model_type), plan))
    actual = logits(apply_plan(tiny_model(model_type), plan))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (expected - unpruned).abs().max() > 1e-2  # the plan matters, so the line above can fail


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_equals_zeroed_columns_in_bfloat16(model_type):
    size = "intermediate_size" if model_type == "gpt_oss" else "moe_intermediate_size"
    model = tiny_model(model_type, dtype=torch.bfloat16, **{size: 16})  # stock experts take multiples of 8
    plan = PruningPlan.build(calibrate(model, calibration_data(24, 24)), HeaprConfig(ratio=0.4))
    expected = logits(zeroed(copy.deepcopy(model), plan))
    actual = logits(apply_plan(model, plan))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and actual.dtype == torch.bfloat16
    assert (actual - expected).float().norm() < 0.02 * expected.float().norm()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_are_the_kept_ones(model_type):
    plan, unpruned = plan_of(model_type), tiny_model(model_type)
    model = apply_plan(tiny_model(model_type), plan)
    for path, experts in plan.kept.items():
        stock, cut = unpruned.get_submodule(path), model.get_submodule(path)
        gate_ups = dict(zip(cut.order, cut.gate_up_proj.split([2 * cut.widths[expert] for expert in cut.order])))
        downs = dict(zip(cut.order, cut.down_proj.split([cut.widths[expert] for expert in cut.order])))
        for expert, kept in enumerate(experts):
            rows = stock.gate_up_proj[expert].T if stock.is_transposed else stock.gate_up_proj[expert]
            columns = stock.down_proj[expert].T if stock.is_transposed else stock.down_proj[expert]
            gates, ups = (rows.chunk(2)) if stock.is_concatenated else (rows[::2], rows[1::2])
            expected = [gates[kept], ups[kept]]
            interleaved = torch.stack(expected, 1).flatten(0, 1)
            assert torch.equal(gate_ups[expert], torch.cat(expected) if stock.is_concatenated else interleaved)
            assert torch.equal(downs[expert], columns[:, kept].T)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_size_falls_by_what_the_plan_says(model_type):
    plan, model = plan_of(model_type), tiny_model(model_type)
    before = model.num_parameters()
    assert apply_plan(model, plan) is model  # in place
    assert model.num_parameters() == before - plan.removed * plan.model["parameters_per_atomic_expert"]
    assert model.num_parameters() == pytest.approx(before * (1 - plan.parameter_ratio))
    assert model.config.expert_widths == plan.widths
    assert {path: module.widths for path, module in model.named_modules() if isinstance(module, AtomicExperts)} == (
        plan.widths
    )


def test_class_and_configuration():
    plan, model = plan_of("qwen3_moe"), tiny_model("qwen3_moe")
    stock_class, shared = type(model), model.model.config
    apply_plan(model, plan)
    assert isinstance(model, stock_class) and type(model).__name__ == "HeaprQwen3MoeForCausalLM"
    assert model.config.model_type == "heapr_qwen3_moe" and model.config is shared
    assert model.config.heapr_config == plan.config.to_dict()
    with pytest.raises(HeaprError, match="pruned already"):
        apply_plan(model, plan)


def test_a_plan_serves_any_number_of_models():
    plan = plan_of("qwen2_moe")
    kept = copy.deepcopy(plan.kept)
    first, second = (logits(apply_plan(tiny_model("qwen2_moe"), plan)) for _ in range(2))
    assert torch.equal(first, second)
    for path in kept:
        assert all(map(torch.equal, kept[path], plan.kept[path]))


@pytest.mark.parametrize("training, requires_grad", [(True, True), (False, False)])
def test_mode_and_gradient_flags_stay(training, requires_grad):
    model = tiny_model("qwen3_moe").train(training).requires_grad_(requires_grad)
    apply_plan(model, plan_of("qwen3_moe"))
    assert {module.training for module in model.modules()} == {training}
    assert {parameter.requires_grad for parameter in model.parameters()} == {requires_grad}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_unpruned_checkpoints_load_as_before(model_type, tmp_path):
    """Pruning a model that was loaded registers how its class is stored, and must leave the family alone."""
    tiny_model(model_type).save_pretrained(tmp_path / "unpruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "unpruned")
    apply_plan(loaded, plan_of(model_type)).save_pretrained(tmp_path / "pruned")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "unpruned", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(again), logits(tiny_model(model_type)))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")), logits(loaded))
    again.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "unpruned" / name).read_bytes()


def test_what_described_the_unpruned_checkpoint_is_forgotten(tmp_path):
    model = tiny_model("qwen3_moe")
    model.config.auto_map = {"AutoModel": "modeling_old.OldModel", "AutoModelForCausalLM": "modeling_old.OldForCausal"}
    apply_plan(model, plan_of("qwen3_moe")).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(auto_map)
    assert all("Heapr" in name and "old" not in name for name in auto_map.values())


def test_a_model_spread_over_devices():
    """Hooks that bring inputs to the weights stay, and go on calling the pruned experts, not the stock ones."""
    from accelerate import dispatch_model

    plan = plan_of("qwen3_moe")
    model = tiny_model("qwen3_moe")
    parts = [f"model.{name}" for name in ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")]
    # One device is enough if hooks are asked for.
    dispatch_model(model, dict.fromkeys([*parts, "lm_head"], "cpu"), main_device="cpu", force_hooks=True)
    path = next(iter(plan.kept))
    hook = model.get_submodule(path)._hf_hook
    apply_plan(model, plan)
    assert model.get_submodule(path)._hf_hook is hook
    assert torch.equal(logits(model), logits(apply_plan(tiny_model("qwen3_moe"), plan)))


def test_an_offloaded_model_is_refused(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    places = {"model": "disk", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(HeaprError, match="offloaded; load it without device_map"):
        apply_plan(model, plan_of("qwen3_moe"))


WRONG_MODELS = {
    "a sibling": lambda: tiny_model("qwen3_moe", seed=1),
    "more layers": lambda: tiny_model("qwen3_moe", num_hidden_layers=3),
    "fewer layers": lambda: tiny_model("qwen3_moe", num_hidden_layers=1),
    "wider experts": lambda: tiny_model("qwen3_moe", moe_intermediate_size=16),
    "more experts": lambda: tiny_model("qwen3_moe", num_experts=8),
    "another family": lambda: tiny_model("qwen2_moe"),
    "a dense model": lambda: tiny_model("llama"),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_plans_of_other_models_are_refused_before_anything_changes(name):
    model = WRONG_MODELS[name]()
    before, model_class = copy.deepcopy(model.state_dict()), type(model)
    with pytest.raises(HeaprError, match="plan|Mixture-of-Experts"):
        apply_plan(model, plan_of("qwen3_moe"))
    assert type(model) is model_class and not hasattr(model.config, "expert_widths")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
