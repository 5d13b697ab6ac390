# Licensed under the Apache License, Version 2.0
"""The native DeepSeekMoE port against checkpoints written by hand and a reference model written from the formulas."""

import ast
import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, dynamic_module_utils
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from optimum_heapr.modeling import configuration_deepseek, modeling_deepseek
from optimum_heapr.modeling.configuration_deepseek import DeepseekConfig
from optimum_heapr.modeling.modeling_deepseek import (
    DeepseekExperts,
    DeepseekForCausalLM,
    DeepseekMLP,
    DeepseekModel,
    DeepseekMoE,
    DeepseekTopKRouter,
)


# The keys of deepseek-ai/deepseek-moe-16b-base's config.json, old-style ones and `auto_map` included, at a tiny size.
HUB_CONFIG = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "model_type": "deepseek",
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 48,
}

VARIANTS = {
    "published": {},
    "normalised_top_k": {"norm_topk_prob": True},
    "top_1_normalised": {"norm_topk_prob": True, "num_experts_per_tok": 1},
    "no_dense_layer": {"first_k_dense_replace": 0},
    "every_other_layer": {"moe_layer_freq": 2, "num_hidden_layers": 4},
    "no_shared_experts_null": {"n_shared_experts": None},
    "no_shared_experts_zero": {"n_shared_experts": 0},
    "attention_bias": {"attention_bias": True},
    "rope_theta": {"rope_theta": 500.0},
    "rope_linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope_dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 8},
}


def make_config_dict(**overrides) -> dict:
    return {**copy.deepcopy(HUB_CONFIG), **copy.deepcopy(overrides)}


def is_moe(cfg: dict, layer: int) -> bool:
    return layer >= cfg["first_k_dense_replace"] and layer % cfg["moe_layer_freq"] == 0


def make_hub_state_dict(cfg: dict) -> dict[str, torch.Tensor]:
    """Random weights under the keys of a published checkpoint: every expert has its own three matrices."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    hidden, width = cfg["hidden_size"], cfg["moe_intermediate_size"]
    kv_width = hidden // cfg["num_attention_heads"] * cfg["num_key_value_heads"]
    state = {
        "model.embed_tokens.weight": random(cfg["vocab_size"], hidden) * hidden**0.5,
        "model.norm.weight": 1 + 0.1 * random(hidden),
        "lm_head.weight": random(cfg["vocab_size"], hidden),
    }

    def add_mlp(prefix: str, intermediate: int) -> None:
        state[f"{prefix}.gate_proj.weight"] = random(intermediate, hidden)
        state[f"{prefix}.up_proj.weight"] = random(intermediate, hidden)
        state[f"{prefix}.down_proj.weight"] = random(hidden, intermediate)

    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        state[f"{prefix}.input_layernorm.weight"] = 1 + 0.1 * random(hidden)
        state[f"{prefix}.post_attention_layernorm.weight"] = 1 + 0.1 * random(hidden)
        for name, rows in (("q_proj", hidden), ("k_proj", kv_width), ("v_proj", kv_width), ("o_proj", hidden)):
            state[f"{prefix}.self_attn.{name}.weight"] = random(rows, hidden)
            if cfg["attention_bias"]:
                state[f"{prefix}.self_attn.{name}.bias"] = random(rows)
        if not is_moe(cfg, layer):
            add_mlp(f"{prefix}.mlp", cfg["intermediate_size"])
            continue
        state[f"{prefix}.mlp.gate.weight"] = random(cfg["n_routed_experts"], hidden) * 2
        for expert in range(cfg["n_routed_experts"]):
            add_mlp(f"{prefix}.mlp.experts.{expert}", width)
        if cfg["n_shared_experts"]:
            add_mlp(f"{prefix}.mlp.shared_experts", width * cfg["n_shared_experts"])
    return state


def write_checkpoint(directory: Path, cfg: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(cfg))
    save_file(make_hub_state_dict(cfg), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def reference_logits(cfg: dict, state: dict[str, torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
    """The model from its formulas, token by token, in plain torch: `input_ids [sequence]` -> `[sequence, vocab]`."""
    hidden, heads, kv_heads = cfg["hidden_size"], cfg["num_attention_heads"], cfg["num_key_value_heads"]
    head_dim, length = hidden // heads, len(input_ids)

    def norm(x: torch.Tensor, key: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + cfg["rms_norm_eps"]).sqrt() * state[f"{key}.weight"]

    def linear(x: torch.Tensor, key: str) -> torch.Tensor:
        return x @ state[f"{key}.weight"].T + state.get(f"{key}.bias", 0.0)

    def mlp(x: torch.Tensor, key: str) -> torch.Tensor:
        gate = linear(x, f"{key}.gate_proj")
        return linear(gate * torch.sigmoid(gate) * linear(x, f"{key}.up_proj"), f"{key}.down_proj")

    def moe(x: torch.Tensor, key: str) -> torch.Tensor:
        output = torch.zeros_like(x)
        for token in range(length):
            logits = state[f"{key}.gate.weight"] @ x[token]
            scores = logits.exp() / logits.exp().sum()
            chosen = sorted(range(len(scores)), key=lambda i: -scores[i].item())[: cfg["num_experts_per_tok"]]
            weights = {i: scores[i] for i in chosen}
            if cfg["norm_topk_prob"] and len(chosen) > 1:
                total = sum(weights.values()) + 1e-20
                weights = {i: weight / total for i, weight in weights.items()}
            for i, weight in weights.items():
                output[token] += weight * mlp(x[token], f"{key}.experts.{i}")
        return output + mlp(x, f"{key}.shared_experts") if cfg["n_shared_experts"] else output

    theta, positions = cfg["rope_theta"], torch.arange(length, dtype=torch.float32)
    scaling = cfg["rope_scaling"] or {"type": None}
    if scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    elif scaling["type"] == "dynamic" and length > cfg["max_position_embeddings"]:
        stretch = scaling["factor"] * length / cfg["max_position_embeddings"] - (scaling["factor"] - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    angles = positions[:, None] / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None]  # one complex factor per position and pair

    def rotate(x: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of `[sequence, heads, head_dim]`; dimension j is paired with j + head_dim / 2."""
        first, second = x.chunk(2, dim=-1)
        rotated = torch.complex(first, second) * rotation
        return torch.cat([rotated.real, rotated.imag], dim=-1)

    def attention(x: torch.Tensor, key: str) -> torch.Tensor:
        query = rotate(linear(x, f"{key}.q_proj").view(length, heads, head_dim))
        keys = rotate(linear(x, f"{key}.k_proj").view(length, kv_heads, head_dim))
        values = linear(x, f"{key}.v_proj").view(length, kv_heads, head_dim)
        outputs = []
        for head in range(heads):
            kv_head = head * kv_heads // heads
            weights = query[:, head] @ keys[:, kv_head].T / head_dim**0.5
            weights = weights.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf")).softmax(-1)
            outputs.append(weights @ values[:, kv_head])
        return linear(torch.cat(outputs, dim=-1), f"{key}.o_proj")

    x = state["model.embed_tokens.weight"][input_ids]
    for layer in range(cfg["num_hidden_layers"]):
        key = f"model.layers.{layer}"
        x = x + attention(norm(x, f"{key}.input_layernorm"), f"{key}.self_attn")
        feed_forward = moe if is_moe(cfg, layer) else mlp
        x = x + feed_forward(norm(x, f"{key}.post_attention_layernorm"), f"{key}.mlp")
    return norm(x, "model.norm") @ state["lm_head.weight"].T


def load(directory: Path, **kwargs) -> DeepseekForCausalLM:
    """`from_pretrained`, and that every weight of the checkpoint found its place."""
    model, info = DeepseekForCausalLM.from_pretrained(directory, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def make_input_ids(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(2, HUB_CONFIG["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def registered():
    """The names that the package registers at import, for tests that go through the Auto classes."""
    AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
    AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hub"), make_config_dict())


# --- configuration ---------------------------------------------------------------------------------------------------


def test_config_defaults_describe_the_published_model():
    config = DeepseekConfig()
    assert config.num_experts == config.n_routed_experts == 64
    assert (config.num_hidden_layers, config.first_k_dense_replace, config.moe_layer_freq) == (28, 1, 1)
    assert [i for i in range(28) if not config.is_moe_layer(i)] == [0]
    assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    assert (config.bos_token_id, config.eos_token_id) == (100000, 100001)
    with torch.device("meta"):
        model = DeepseekForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 16_375_728_128  # "16B" (16.4B in the paper)


def test_config_reads_old_style_keys_and_round_trips(tmp_path):
    cfg = make_config_dict(rope_theta=500, rope_scaling={"type": "dynamic", "factor": 2.0}, torch_dtype="bfloat16")
    config = DeepseekConfig.from_dict(cfg)
    assert config.rope_parameters["rope_type"] == "dynamic"
    assert (config.rope_parameters["rope_theta"], config.rope_parameters["factor"]) == (500, 2.0)
    assert config.dtype == torch.bfloat16
    config.save_pretrained(tmp_path)
    assert DeepseekConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    kept = {"rope_theta", "rope_scaling", "torch_dtype", "transformers_version"}  # renamed by transformers 5
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {key: saved.get(key) for key in cfg if key not in kept} == {k: v for k, v in cfg.items() if k not in kept}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"scoring_func": "sigmoid"}, ["scoring_func='sigmoid'", "'softmax'"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok=9", "n_routed_experts=8"]),
        ({"num_experts_per_tok": None}, ["num_experts_per_tok=None"]),
        ({"moe_layer_freq": 0}, ["moe_layer_freq=0"]),
        ({"hidden_size": 30}, ["30", "4"]),
    ],
)
def test_config_refuses_what_the_architecture_cannot_be(overrides, words):
    with pytest.raises(ValueError) as error:
        DeepseekConfig.from_dict(make_config_dict(**overrides))
    assert all(word in str(error.value) for word in words)


def test_value_set_after_construction_is_checked_when_the_model_is_built(checkpoint):
    with pytest.raises(ValueError, match="scoring_func='sigmoid'"):
        DeepseekForCausalLM.from_pretrained(checkpoint, scoring_func="sigmoid")


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_gives_the_logits_of_the_formulas_and_is_saved_unchanged(variant, tmp_path):
    cfg = make_config_dict(**VARIANTS[variant])
    state = make_hub_state_dict(cfg)
    model = load(write_checkpoint(tmp_path / "hub", cfg))
    input_ids = make_input_ids()
    with torch.no_grad():
        logits = model(input_ids).logits
    expected = torch.stack([reference_logits(cfg, state, row) for row in input_ids])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in state)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved")(input_ids).logits, logits)


def test_blocks_follow_the_configuration(tmp_path):
    cfg = make_config_dict(first_k_dense_replace=1, moe_layer_freq=2, num_hidden_layers=4, n_shared_experts=None)
    model = load(write_checkpoint(tmp_path, cfg))
    assert [type(layer.mlp) for layer in model.model.layers] == [DeepseekMLP, DeepseekMLP, DeepseekMoE, DeepseekMLP]
    assert not any("shared_experts" in name for name, _ in model.named_parameters())


def test_no_routed_experts_is_a_dense_model():
    model = DeepseekForCausalLM(DeepseekConfig.from_dict(make_config_dict(n_routed_experts=None)))
    assert all(isinstance(layer.mlp, DeepseekMLP) for layer in model.model.layers)
    assert model(make_input_ids()).logits.isfinite().all()


def test_auto_classes_take_the_port_despite_the_auto_map(registered, checkpoint):
    input_ids = make_input_ids()
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(model) is DeepseekForCausalLM and type(model.config) is DeepseekConfig
    base, info = AutoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert type(base) is DeepseekModel and not info["missing_keys"]
    with torch.no_grad():
        torch.testing.assert_close(base(input_ids)[0], model.model(input_ids)[0], rtol=0, atol=0)


def test_files_work_as_remote_code(checkpoint, tmp_path, monkeypatch):
    """The two files beside a checkpoint, imported from there rather than from the package, load and save it alike."""
    shutil.copytree(checkpoint, tmp_path / "hub")
    for module in (configuration_deepseek, modeling_deepseek):
        shutil.copy(module.__file__, tmp_path / "hub")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    reference = "modeling_deepseek.DeepseekForCausalLM"
    remote = dynamic_module_utils.get_class_from_dynamic_module(reference, tmp_path / "hub")
    assert remote is not DeepseekForCausalLM
    model, info = remote.from_pretrained(tmp_path / "hub", experts_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    assert type(model.config).__module__.startswith("transformers_modules.")
    input_ids = make_input_ids()
    with torch.no_grad():
        expected = load(checkpoint, experts_implementation="eager")(input_ids).logits
        assert torch.equal(model(input_ids).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == make_hub_state_dict(HUB_CONFIG).keys()


@pytest.mark.parametrize("module", [configuration_deepseek, modeling_deepseek])
def test_files_are_self_contained(module):
    tree = ast.parse(Path(module.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert (node.level, node.module) == (1, "configuration_deepseek")
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {name.split(".")[0] for name in names} <= {"torch", "transformers", "math"}


def test_registration_repeats_but_leaves_a_different_conversion_alone():
    modeling_deepseek._register_checkpoint_conversion()
    ours = get_checkpoint_conversion_mapping("deepseek")
    stock = get_checkpoint_conversion_mapping("qwen2_moe")
    assert modeling_deepseek._patterns(ours) == modeling_deepseek._patterns(stock)
    foreign = get_checkpoint_conversion_mapping("mixtral")
    register_checkpoint_conversion_mapping("deepseek", foreign, overwrite=True)
    try:
        modeling_deepseek._register_checkpoint_conversion()
        kept = get_checkpoint_conversion_mapping("deepseek")
    finally:
        register_checkpoint_conversion_mapping("deepseek", ours, overwrite=True)
    assert modeling_deepseek._patterns(kept) == modeling_deepseek._patterns(foreign)


# --- the router ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_scores_in_the_dtype_of_the_model(dtype):
    router = DeepseekTopKRouter(DeepseekConfig.from_dict(make_config_dict()))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    router.to(dtype)
    tokens = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits, weights, index = router(tokens)
    assert weights.dtype == dtype and (weights.shape, index.shape) == ((5, 3), (5, 3))
    assert torch.equal(weights, logits.softmax(-1).gather(1, index))


def test_random_initialisation_reaches_experts_and_router():
    model = DeepseekForCausalLM(DeepseekConfig.from_dict(make_config_dict(hidden_size=256, initializer_range=0.05)))
    block = model.model.layers[1].mlp
    assert block.experts.gate_up_proj.std().item() == pytest.approx(0.05, rel=0.05)
    assert block.experts.down_proj.std().item() == pytest.approx(0.05, rel=0.05)
    assert block.gate.weight.abs().max().item() <= 256**-0.5  # uniform within 1 / sqrt(hidden_size)
    assert block.gate.weight.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.05)


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_implementations_agree_forward_and_backward(checkpoint, implementation):
    input_ids = make_input_ids()
    outputs = {}
    for name in ("eager", implementation):
        model = load(checkpoint, experts_implementation=name)
        assert model.config._experts_implementation == name
        output = model(input_ids, labels=input_ids)
        output.loss.backward()
        outputs[name] = (output.logits.detach(), {key: p.grad for key, p in model.named_parameters()})
    torch.testing.assert_close(outputs[implementation], outputs["eager"], rtol=1e-5, atol=1e-5)


def test_experts_implementation_can_be_switched_and_defaults_to_grouped_mm(checkpoint):
    model = load(checkpoint)
    assert model.config._experts_implementation == "grouped_mm"

    class DefinedElsewhere(DeepseekForCausalLM):
        """Its own module's source need not mention the decorator."""

    for cls in (DeepseekModel, DeepseekForCausalLM, DefinedElsewhere):
        assert cls._can_set_experts_implementation()
    model.set_experts_implementation("eager")
    experts = [module for module in model.modules() if isinstance(module, DeepseekExperts)]
    assert len(experts) == 2 and all(module.config._experts_implementation == "eager" for module in experts)


def test_generation_with_cache_equals_generation_without(checkpoint):
    model = load(checkpoint)
    input_ids = make_input_ids(length=5)
    input_ids[0, :2] = 0
    mask = torch.ones_like(input_ids)
    mask[0, :2] = 0  # left padding
    length = {"max_new_tokens": 8, "min_new_tokens": 8}
    output = {"return_dict_in_generate": True, "output_logits": True}
    runs = [
        model.generate(input_ids, attention_mask=mask, use_cache=use_cache, do_sample=False, **length, **output)
        for use_cache in (True, False)
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    torch.testing.assert_close(torch.stack(runs[0].logits), torch.stack(runs[1].logits), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")  # the new names are not in 5.17 yet
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_reach_every_parameter_and_checkpointing_does_not_change_them(checkpoint, use_reentrant):
    input_ids = make_input_ids()
    gradients = []
    for checkpointing in (False, True):
        model = load(checkpoint).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert model.is_gradient_checkpointing
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)


def test_train_and_eval_mode_give_the_same_gradients(checkpoint):
    """The published code has no expert gradients in eval mode and those of a balancing loss on top in train mode."""
    input_ids = make_input_ids()
    gradients = []
    for training in (False, True):
        model = load(checkpoint).train(training)
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_hidden_states_and_attentions_are_recorded(checkpoint):
    model = load(checkpoint, attn_implementation="eager")
    output = model(make_input_ids(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and output.hidden_states[0].shape == (2, 12, 32)
    assert len(output.attentions) == 3 and output.attentions[0].shape == (2, 4, 12, 12)


def test_runs_in_bfloat16(checkpoint):
    input_ids = make_input_ids()
    with torch.no_grad():
        half = load(checkpoint, dtype=torch.bfloat16)(input_ids).logits
        full = load(checkpoint)(input_ids).logits
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float().flatten(), full.flatten(), dim=0) > 0.99
