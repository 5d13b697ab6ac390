# Licensed under the Apache License, Version 2.0
"""Writes Qwen3-MoE and DeepSeekMoE models as GGUF, the format of llama.cpp, in float32: enough to run them there.

For use beyond tests, llama.cpp's own `convert_hf_to_gguf.py` does this for many architectures and types.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import torch


ARCHITECTURES = {"qwen3_moe": "qwen3moe", "deepseek": "deepseek"}
# transformers' names of the weights of a decoder layer, and llama.cpp's; a layer has some of them.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def write_gguf(model: torch.nn.Module, path: Path, tokenizer: dict | None = None) -> None:
    """Writes a model of any expert width.

    Args:
        model (`PreTrainedModel`): a Qwen3-MoE or DeepSeekMoE model, of the stock architecture.
        path (`Path`): file to write.
        tokenizer (`dict`, *optional*): content of `tokenizer.json`, byte-level BPE; without it token ids have no text.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    if config.model_type == "deepseek":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_scale(1.0)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, config.vocab_size, tokenizer)

    def add(name: str, tensor: torch.Tensor) -> None:
        writer.add_tensor(f"{name}.weight", tensor.detach().float().contiguous().numpy())

    add("token_embd", model.model.embed_tokens.weight)
    add("output_norm", model.model.norm.weight)
    if not config.tie_word_embeddings:
        add("output", model.lm_head.weight)
    for index, layer in enumerate(model.model.layers):
        modules = dict(layer.named_modules())
        for theirs, ours in LAYER.items():
            if theirs in modules:
                weight = modules[theirs].weight
                if config.model_type == "deepseek" and ours in ("attn_q", "attn_k"):
                    weight = _rotated_in_pairs(weight, config.head_dim)
                add(f"blk.{index}.{ours}", weight)
        if not hasattr(layer.mlp, "experts"):
            continue
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        add(f"blk.{index}.ffn_gate_exps", gate)
        add(f"blk.{index}.ffn_up_exps", up)
        add(f"blk.{index}.ffn_down_exps", layer.mlp.experts.down_proj)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rotated_in_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows in the order in which llama.cpp rotates them for this architecture: neighbours, not halves."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int, tokenizer: dict | None) -> None:
    vocabulary = tokenizer["model"]["vocab"] if tokenizer else {f"<{index}>": index for index in range(vocab_size)}
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["id"] for token in tokenizer["added_tokens"]} if tokenizer else {0}
    merges = tokenizer["model"]["merges"] if tokenizer else ["< 0"]  # there must be some
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL for index in range(len(tokens))]
    )
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
