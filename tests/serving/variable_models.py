# Licensed under the Apache License, Version 2.0
"""Tiny random checkpoints of variable widths, made of nothing but `modeling/`: vLLM's environment has no more."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_heapr.experts import find_expert_blocks


VOCAB_SIZE = 96
# Kernels of vLLM want hidden sizes that are multiples of 32, and heads of 32.
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    # Large enough that activations bend and experts differ.
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
FINE_GRAINED = {"moe_intermediate_size": 96, "intermediate_size": 64, "num_experts_per_tok": 2}
DEEPSEEK = {**FINE_GRAINED, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}
GROUPED = {**DEEPSEEK, "n_group": 2, "topk_group": 1}
# vLLM's latent attention knows the sizes of the published models alone.
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "head_dim": 64}
COARSE = {"intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2}
CONFIGS = {
    "deepseek": DEEPSEEK,
    "deepseek_v2": {**GROUPED, **LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**GROUPED, **LATENT, "q_lora_rank": 32, "topk_method": "noaux_tc"},
    "ernie4_5_moe": {**FINE_GRAINED, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 2},
    "glm4_moe": GROUPED,
    "gpt_oss": {**COARSE, "layer_types": ["full_attention"] * 3, "head_dim": 64, "sliding_window": 128},
    "granitemoe": {**COARSE, "logits_scaling": 2.0},
    "mixtral": COARSE,
    "olmoe": {"intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {**FINE_GRAINED, "num_experts": 8, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**FINE_GRAINED, "num_experts": 8},
}


def pruned_class(family: str, stock: type) -> type:
    """The class of pruned models of a family."""
    if family == "deepseek":
        from optimum_heapr.modeling.modeling_heapr_deepseek import HeaprDeepseekForCausalLM

        return HeaprDeepseekForCausalLM
    from optimum_heapr.modeling.modeling_heapr import pruned_model_class

    return pruned_model_class(stock)


def variable_model(family: str, seed: int = 0, multiple: int = 1, **overrides) -> torch.nn.Module:
    """A tiny random model of a family with experts of 0 to all of their width, in multiples, in float32."""
    torch.manual_seed(seed)
    generator = random.Random(seed)
    config = AutoConfig.for_model(family, **SMALL | CONFIGS[family] | overrides)
    stock = AutoModelForCausalLM.from_config(config)
    widths = {}
    for block in find_expert_blocks(stock):
        drawn = [generator.randrange(multiple, block.width, multiple) for _ in range(block.num_experts - 2)]
        widths[block.path] = [0, *drawn, block.width]
    model_class = pruned_class(family, type(stock))
    fields = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    model = model_class(model_class.config_class(**fields, expert_widths=widths)).eval()
    for name, parameter in model.named_parameters():  # biases and norms start as constants, which hide mistakes
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, 0.0, 0.1)
    return model


def variable_checkpoint(folder: Path, family: str, **overrides) -> torch.nn.Module:
    """Saves such a model; returns it."""
    model = variable_model(family, **overrides)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def padded_checkpoint(folder: Path, family: str, pruned: torch.nn.Module) -> None:
    """Saves the stock model that computes what a pruned one does: experts of the full width, with zeros."""
    fields = {name: value for name, value in pruned.config.to_dict().items() if name != "architectures"}
    fields = {
        name: value for name, value in fields.items() if name not in ("model_type", "expert_widths", "heapr_config")
    }
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    experts = {block.path: block.width for block in find_expert_blocks(stock)}
    others = {name: value for name, value in pruned.state_dict().items() if ".experts." not in name}
    assert all(".experts." in name for name in stock.load_state_dict(others, strict=False).missing_keys)
    for path, width in experts.items():
        source, target = pruned.get_submodule(path), stock.get_submodule(path)
        target.gate_up_proj.zero_()
        target.down_proj.zero_()
        start = 0
        for expert in source.order:
            kept = source.widths[expert]
            gate, up = source.gate_up_proj[2 * start : 2 * (start + kept)].chunk(2)
            target.gate_up_proj[expert, :kept], target.gate_up_proj[expert, width : width + kept] = gate, up
            target.down_proj[expert, :, :kept] = source.down_proj[start : start + kept].T
            start += kept
    stock.save_pretrained(folder)
