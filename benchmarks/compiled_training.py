# Licensed under the Apache License, Version 2.0
"""Forward and backward of one MoE block of uneven widths: as operations of a compiled graph, against without compiling.

    python benchmarks/compiled_training.py

Prints one table; times are medians of interleaved runs.
"""

import argparse
from functools import partial

import torch
from moe_block import pruned_block, timed
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from optimum_heapr.cli.tables import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=float, default=0.4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30, help="the second half of them counts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = Qwen3MoeConfig(
        hidden_size=args.hidden,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        moe_intermediate_size=args.width,
    )
    block = pruned_block(Qwen3MoeExperts(config).to(device), args.kept, 16)
    ways = {"plain": block, "compiled": torch.compile(block, fullgraph=True)}

    def draw():
        weights, index = torch.rand(args.tokens, args.experts, device=device).topk(args.top_k)
        return torch.randn(args.tokens, args.hidden, device=device), index, weights

    def step(run, hidden, index, weights):
        block.zero_grad()
        with torch.enable_grad():
            run(hidden.requires_grad_(), index, weights).square().sum().backward()

    rows = []
    for implementation in ("eager", "grouped_mm"):
        config._experts_implementation = implementation
        for experts in ("trained", "frozen"):
            block.requires_grad_(experts == "trained")
            calls = {name: partial(step, run) for name, run in ways.items()}
            times = timed(calls, draw, args.rounds, device)
            rows.append(
                [
                    implementation,
                    experts,
                    f"{times['plain'] * 1e3:.1f}",
                    f"{times['compiled'] * 1e3:.1f}",
                    f"{times['compiled'] / times['plain']:.2f}",
                ]
            )
    print(table(["implementation", "experts", "plain, ms", "compiled, ms", "ratio"], rows))


if __name__ == "__main__":
    main()
