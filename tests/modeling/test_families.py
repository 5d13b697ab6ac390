# Licensed under the Apache License, Version 2.0
"""Every family that we say is tested: calibrate, prune 30 % globally, save, reload, and compare logits."""

import re

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.configuration import HeaprConfig
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.families import TESTED, families_markdown, scan_families
from optimum_heapr.fingerprint import model_fingerprint
from optimum_heapr.modeling.auto import register_model_class
from optimum_heapr.planning.plan import PruningPlan
from optimum_heapr.pruner import HeaprPruner
from optimum_heapr.text.samples import CalibrationData
from tests.helpers import repository


SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
FINE_GRAINED = {"moe_intermediate_size": 16, "intermediate_size": 24, "num_experts_per_tok": 2}
DEEPSEEK = {
    **FINE_GRAINED,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 2,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
COARSE = {"intermediate_size": 16, "num_local_experts": 6, "num_experts_per_tok": 2}
CONFIGS = {
    "deepseek": {**DEEPSEEK, "n_group": None, "topk_group": None},
    "deepseek_v2": {**DEEPSEEK, **LATENT, "num_key_value_heads": 4, "topk_method": "greedy"},
    "deepseek_v3": {**DEEPSEEK, **LATENT, "num_key_value_heads": 4},
    "dots1": {**DEEPSEEK, "layer_types": ["full_attention"] * 3},
    "ernie4_5_moe": {**FINE_GRAINED, "moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 2},
    "glm4_moe": {**DEEPSEEK},
    "gpt_oss": {**COARSE, "layer_types": ["full_attention"] * 3},
    "granitemoe": {**COARSE, "logits_scaling": 2.0},
    "hunyuan_v1_moe": {**COARSE, "num_experts": 6, "moe_topk": 2},
    "minimax_m2": {**COARSE, "rotary_dim": 8},
    "mixtral": {**COARSE},
    "olmoe": {"intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2},
    "phimoe": {**COARSE, "sliding_window": None},
    "qwen2_moe": {**FINE_GRAINED, "num_experts": 6, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**FINE_GRAINED, "num_experts": 6},
    "qwen3_next": {
        **FINE_GRAINED,
        "num_experts": 6,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


def make_config(model_type: str) -> PreTrainedConfig:
    """The configuration of a tiny model of the family."""
    if model_type == "qwen3_vl_moe":
        text = {
            key: value for key, value in {**SMALL, **FINE_GRAINED, "num_experts": 6}.items() if "token_id" not in key
        }
        text["hidden_size"] = 40  # of no matrix the only one: what is square may be stored either way round
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 40}
        vision["deepstack_visual_indexes"] = [0]
        return AutoConfig.for_model(model_type, text_config=text, vision_config=vision)
    return AutoConfig.for_model(model_type, **{**SMALL, **CONFIGS[model_type]})


def make_model(model_type: str, config: PreTrainedConfig | None = None, seed: int = 0) -> torch.nn.Module:
    """A tiny random model of the family, in float32."""
    torch.manual_seed(seed)
    config = config or make_config(model_type)
    auto_class = AutoModelForImageTextToText if model_type == "qwen3_vl_moe" else AutoModelForCausalLM
    model = auto_class.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight") and not parameter.any():  # before transformers 5.18, routers of ERNIE 4.5
            torch.nn.init.normal_(parameter, std=SMALL["initializer_range"])
    return model


@pytest.mark.parametrize("model_type", TESTED)
def test_calibrate_prune_save_and_reload(model_type, tmp_path):
    model = make_model(model_type)
    ids = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(1))
    statistics = calibrate(model, CalibrationData(list(ids), "random", 0, 24), batch_size=2)
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=0.3, seq_length=24))
    assert plan.ratio == pytest.approx(0.3, abs=0.01)
    assert plan.estimated_loss_increase > 0

    # What pruning must equal: the same model with the removed columns of the down projections set to zero.
    pruner = HeaprPruner(model)
    with torch.no_grad():
        for block in find_expert_blocks(model):
            for expert, kept in enumerate(plan.kept[block.path]):
                removed = torch.ones(block.width, dtype=torch.bool)
                removed[kept] = False
                block.down_rows(expert)[removed] = 0.0
        expected = model(input_ids=ids).logits
        plan.model = model_fingerprint(model, find_expert_blocks(model))
        pruned = pruner.apply(plan)
        actual = pruned(input_ids=ids).logits
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)

    pruner.save_pretrained(tmp_path / "pruned")
    auto_class = AutoModelForImageTextToText if model_type == "qwen3_vl_moe" else AutoModelForCausalLM
    reloaded, info = auto_class.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(reloaded).__name__.startswith("Heapr")
    assert reloaded.config.model_type == f"heapr_{model_type}"
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(input_ids=ids).logits, actual)
    assert sum(parameter.numel() for parameter in reloaded.parameters()) == sum(
        parameter.numel() for parameter in pruned.parameters()
    )


@pytest.fixture(scope="module")
def families():
    return scan_families()


def test_every_prunable_family_of_the_installed_transformers_is_registered(families):
    prunable = {family.model_type: family.model_class for family in families if family.status != "refused"}
    assert set(prunable) > set(TESTED)
    for model_type, model_class in prunable.items():
        config_class = CONFIG_MAPPING[f"heapr_{model_type}"]
        assert config_class.model_type == f"heapr_{model_type}"
        assert register_model_class(config_class).__name__ == f"Heapr{model_class}"


def test_refusals_say_why(families):
    refused = {family.model_type: family.note for family in families if family.status == "refused"}
    assert "no gate projection" in refused["nemotron_h"]
    assert "not on the experts interface" in refused["llama4"]


def test_every_tested_family_is_listed_as_such(families):
    assert {family.model_type for family in families if family.status == "tested"} == set(TESTED)
    assert "| `qwen3_moe` | Qwen3MoeForCausalLM | tested |" in families_markdown(families)


def test_the_page_of_families_is_what_the_command_prints(families):
    page = (repository() / "docs" / "source" / "families.md").read_text(encoding="utf-8")
    described = re.search(r"finds in transformers ([\d.]+\d):", page)[1]
    if not transformers.__version__.startswith(f"{described}."):
        pytest.skip(f"the page is of transformers {described}, and {transformers.__version__} is installed")
    assert families_markdown(families) in page, "run: python docs/build.py --update-families"
