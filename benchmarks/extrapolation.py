# Licensed under the Apache License, Version 2.0
"""What calibrating Qwen3-30B-A3B and Qwen3-235B-A22B takes, by formula: bytes read, memory, operations.

    python benchmarks/extrapolation.py

Prints the table of `docs/source/guides/large_models.md`. Nothing is run: configurations are those of the published models,
written out here, and their weights have no storage. `tests/benchmarks/test_extrapolation.py` holds the formulas against
counted operations and bytes of small models.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


MODES = ("plain", "offload", "streaming")

_COMMON = {
    "vocab_size": 151_936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
MODELS = {
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        moe_intermediate_size=768,
        intermediate_size=6144,
        **_COMMON,
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        hidden_size=4096,
        num_hidden_layers=94,
        num_attention_heads=64,
        moe_intermediate_size=1536,
        intermediate_size=12_288,
        **_COMMON,
    ),
}


@dataclass
class Calibration:
    """One calibration of a Qwen3-MoE model, all of whose layers have experts.

    Args:
        config (`Qwen3MoeConfig`): the model.
        samples, length (`int`): samples, and tokens in each.
        batch_size (`int`): samples in a micro-batch.
        itemsize (`int`): bytes of a weight and of an activation.
    """

    config: Qwen3MoeConfig
    samples: int = 128
    length: int = 2048
    batch_size: int = 1
    itemsize: int = 2

    def __post_init__(self) -> None:
        with torch.device("meta"):
            model = Qwen3MoeForCausalLM(self.config)
        self.parameters = model.num_parameters()
        self.layer_parameters = sum(parameter.numel() for parameter in model.model.layers[0].parameters())

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def micro_batches(self) -> int:
        return -(-self.samples // self.batch_size)

    # Operations: two for each multiplication and addition, matrix products only.

    @property
    def projection_flops(self) -> int:
        """Forward of the matrices of one layer for all tokens: attention, router and the experts of each token."""
        c = self.config
        heads = c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
        experts = c.num_experts_per_tok * 3 * c.moe_intermediate_size
        return 2 * self.tokens * c.hidden_size * (heads + c.num_experts + experts)

    @property
    def attention_flops(self) -> int:
        """Forward of queries times keys and weights times values of one layer, each token with all of its sample: kernels
        that leave out what is masked do about half."""
        return 2 * 2 * self.tokens * self.length * self.config.num_attention_heads * self.config.head_dim

    @property
    def head_flops(self) -> int:
        return 2 * self.tokens * self.config.hidden_size * self.config.vocab_size

    @property
    def forward_flops(self) -> int:
        return self.config.num_hidden_layers * (self.projection_flops + self.attention_flops) + self.head_flops

    @property
    def backward_flops(self) -> int:
        """Gradients of activations only: as much as the forward for a matrix, 5/2 of it for attention, whose kernels compute
        the weights again. It ends at h of the first layer, where only the down projection lies behind."""
        c = self.config
        down = 2 * self.tokens * c.num_experts_per_tok * c.hidden_size * c.moe_intermediate_size
        layer = self.projection_flops + self.attention_flops * 5 // 2
        return self.head_flops + (c.num_hidden_layers - 1) * layer + down

    def flops(self, mode: str) -> int:
        """`offload` and `streaming` compute each layer a second time for the backward."""
        again = 0 if mode == "plain" else self.forward_flops - self.head_flops
        return self.forward_flops + again + self.backward_flops

    # Bytes

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.itemsize

    @property
    def layer_bytes(self) -> int:
        return self.config.num_hidden_layers * self.layer_parameters * self.itemsize

    def bytes_read(self, mode: str) -> int:
        """Weights that are brought to where they compute: all once, or each layer twice in every micro-batch (`offload`, of
        which no layer has room to stay), or all twice (`streaming`)."""
        if mode == "offload":
            return 2 * self.micro_batches * self.layer_bytes + self.weight_bytes - self.layer_bytes
        return {"plain": 1, "streaming": 2}[mode] * self.weight_bytes

    @property
    def statistics_bytes(self) -> int:
        """Three float32 sums an atomic expert; a norm and a count (eight bytes) an expert."""
        experts = self.config.num_hidden_layers * self.config.num_experts
        return experts * (3 * 4 * self.config.moe_intermediate_size + 4 + 8)

    @property
    def matrix_bytes(self) -> int:
        """Two float32 matrices an expert, where `obs` or compensation is asked for."""
        return self.config.num_hidden_layers * self.config.num_experts * 2 * 4 * self.config.moe_intermediate_size**2

    def weights_at_once(self, mode: str) -> int:
        """Weights on the device: all, or the larger of one layer and the head."""
        if mode == "plain":
            return self.weight_bytes
        return self.itemsize * max(self.layer_parameters, self.config.vocab_size * self.config.hidden_size)

    @property
    def layer_inputs(self) -> int:
        """`streaming` keeps the input of every layer and the gradients of one for all tokens, on the host and on disk."""
        return (self.config.num_hidden_layers + 2) * self.tokens * self.config.hidden_size * self.itemsize


def gib(size: int) -> str:
    return f"{size / 2**30:,.2f}" if size < 10 * 2**30 else f"{size / 2**30:,.0f}"


def markdown(samples: int = 128, length: int = 2048) -> str:
    """The table of the documentation."""
    header = ["model", "`--memory`", "PFLOP", "weights read, GiB", "weights at once, GiB", "layer inputs kept, GiB"]
    header += ["vectors, GiB", "matrices, GiB"]
    lines = [header, ["---"] * len(header)]
    for name, config in MODELS.items():
        for mode in MODES:
            run = Calibration(config, samples, length)
            lines.append([name, mode, f"{run.flops(mode) / 1e15:,.2f}", gib(run.bytes_read(mode))])
            kept = gib(run.layer_inputs) if mode == "streaming" else ""
            lines[-1] += [gib(run.weights_at_once(mode)), kept, gib(run.statistics_bytes), gib(run.matrix_bytes)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048, help="tokens in a sample")
    args = parser.parse_args()
    print(markdown(args.samples, args.length))


if __name__ == "__main__":
    main()
