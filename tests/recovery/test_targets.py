# Licensed under the Apache License, Version 2.0
"""What the presets of targets are in models of several families."""

import copy

import pytest
from peft import LNTuningConfig, LoraConfig

from optimum_heapr import HeaprError, RecoveryConfig
from optimum_heapr.recovery.targets import adapter_config, expert_paths, linear_paths, norm_paths, router_paths
from optimum_heapr.surgery.linear import to_linear_experts
from tests.helpers import tiny_model


def last_names(paths):
    return {path.rpartition(".")[2] for path in paths}


@pytest.mark.parametrize(
    ("family", "router", "linear"),
    [
        ("qwen3_moe", "gate", set()),
        (
            "qwen2_moe",
            "gate",
            {"gate_proj", "up_proj", "down_proj"},
        ),  # the shared expert, but not its gate of one output
        ("gpt_oss", "router", set()),
        ("deepseek", "gate", {"gate_proj", "up_proj", "down_proj"}),  # shared experts and the dense layer
    ],
)
def test_parts_of_a_model(family, router, linear):
    model = tiny_model(family)
    experts = expert_paths(model)
    assert len(experts) == 2 and last_names(experts) == {"experts"}
    assert router_paths(model, experts) == [path.replace(".experts", f".{router}") for path in experts]
    found = linear_paths(model, experts)
    assert last_names(found) == {"q_proj", "k_proj", "v_proj", "o_proj"} | linear
    assert not any(".experts." in path or "lm_head" in path for path in found)
    assert "model.norm" in norm_paths(model) and all("norm" in path for path in norm_paths(model))


def test_presets_are_descriptions_of_peft():
    model = tiny_model("qwen2_moe")
    made = {
        name: adapter_config(model, RecoveryConfig(targets=name, rank=3)) for name in ("attention", "experts", "all")
    }
    assert all(isinstance(config, LoraConfig) and (config.r, config.lora_alpha) == (3, 6) for config in made.values())
    assert made["attention"].target_parameters is None and made["attention"].modules_to_save is None
    assert not made["experts"].target_modules and len(made["experts"].target_parameters) == 4
    assert set(made["all"].target_modules) == set(made["attention"].target_modules)
    router = adapter_config(model, RecoveryConfig(targets="router"))
    assert isinstance(router, LNTuningConfig) and set(router.target_modules) == set(made["all"].modules_to_save)


def test_experts_as_linear_layers_are_found(pruned):
    """The same parts as of the packed form; each layer of an expert that has some width gets an update of its own."""
    packed, linear = pruned.model, to_linear_experts(copy.deepcopy(pruned.model))
    experts = expert_paths(packed)
    assert expert_paths(linear) == experts and router_paths(linear, experts) == router_paths(packed, experts)
    assert linear_paths(linear, experts) == linear_paths(packed, experts)
    made = {name: adapter_config(linear, RecoveryConfig(targets=name)) for name in ("attention", "experts", "all")}
    widths = [width for path in experts for width in linear.config.expert_widths[path]]
    assert len(made["experts"].target_modules) == 3 * sum(width > 0 for width in widths)
    assert not made["all"].target_parameters and made["all"].modules_to_save
    assert made["all"].target_modules == made["experts"].target_modules | made["attention"].target_modules


def test_nothing_to_train_is_refused():
    with pytest.raises(HeaprError, match="targets='experts': the model \\(llama\\) has no such parameters"):
        adapter_config(tiny_model("llama"), RecoveryConfig(targets="experts"))
