# Licensed under the Apache License, Version 2.0
"""Writes a Qwen3-MoE model as GGUF, the format of llama.cpp, in float32: enough to run it there, and no more.

For use beyond tests, llama.cpp's own `convert_hf_to_gguf.py` does this for many architectures and types.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import torch


# transformers' names of the weights of a decoder layer, and llama.cpp's.
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
}


def write_gguf(model: torch.nn.Module, path: Path, tokenizer: dict | None = None) -> None:
    """Writes `Qwen3MoeForCausalLM` of any expert width.

    Args:
        model (`Qwen3MoeForCausalLM`): a model of the stock architecture.
        path (`Path`): file to write.
        tokenizer (`dict`, *optional*): content of `tokenizer.json`, byte-level BPE; without it token ids have no text.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen3moe")
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
        for theirs, ours in LAYER.items():
            add(f"blk.{index}.{ours}", layer.get_submodule(theirs).weight)
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        add(f"blk.{index}.ffn_gate_exps", gate)
        add(f"blk.{index}.ffn_up_exps", up)
        add(f"blk.{index}.ffn_down_exps", layer.mlp.experts.down_proj)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
