# Licensed under the Apache License, Version 2.0
"""Latency of one MoE block: variable widths against the stock block, both in one run.

    python benchmarks/moe_block.py --kept 0.4

Prints one table of ratios to the stock block's fastest implementation. Times are medians of interleaved runs; each round
draws a new routing, as a model does, so that nothing profits from shapes that were seen before.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from optimum_heapr.cli.tables import table
from optimum_heapr.modeling.atomic_experts import AtomicExperts


def pruned_block(stock: torch.nn.Module, kept: float, multiple: int, seed: int = 0) -> AtomicExperts:
    """A block whose experts keep `kept` of their width on average, unevenly as a global plan does."""
    generator = torch.Generator().manual_seed(seed)
    width, experts = stock.down_proj.shape[2], stock.num_experts
    shares = torch.rand(experts, generator=generator)
    shares = (shares * kept / shares.mean()).clamp(max=1)
    widths = ((shares * width / multiple).round() * multiple).long().clamp(max=width).tolist()
    block = AtomicExperts(stock, widths)
    torch.nn.init.normal_(block.gate_up_proj, std=0.02)
    torch.nn.init.normal_(block.down_proj, std=0.02)
    return block


@torch.no_grad()
def timed(calls: dict, draw, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each call over the second half of the rounds; `draw` gives the inputs of a round.

    On a CPU, seconds of the processor: other processes cost less of those.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    samples = {name: [] for name in calls}
    for _ in range(rounds):
        inputs = draw()
        for name, call in calls.items():
            start = clock()
            call(*inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            samples[name].append(clock() - start)
    return {name: statistics.median(values[rounds // 2 :]) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=float, default=0.4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=40, help="runs of each cell; the second half of them counts")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = Qwen3MoeConfig(
        hidden_size=args.hidden,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        moe_intermediate_size=args.width,
    )
    rows = []
    for dtype_name in args.dtypes:
        dtype = getattr(torch, dtype_name)
        stock = Qwen3MoeExperts(config).to(device, dtype)
        torch.nn.init.normal_(stock.gate_up_proj, std=0.02)
        torch.nn.init.normal_(stock.down_proj, std=0.02)
        blocks = {multiple: pruned_block(stock, args.kept, multiple) for multiple in args.multiples}
        for tokens in args.tokens:

            def draw(tokens=tokens, dtype=dtype):
                weights, index = torch.rand(tokens, args.experts, device=device).topk(args.top_k)
                hidden = torch.randn(tokens, args.hidden, device=device, dtype=dtype)
                return hidden, index, (weights / weights.sum(1, keepdim=True)).to(dtype)

            def call(block, implementation, *inputs):
                config._experts_implementation = implementation
                block(*inputs)

            names = ["eager", "grouped_mm"] + (["batched_mm"] if tokens <= 4 else [])
            calls = {f"stock {name}": partial(call, stock, name) for name in names}
            for multiple, block in blocks.items():
                for name in ("eager", "grouped_mm"):
                    calls[f"pruned/{multiple} {name}"] = partial(call, block, name)
            times = timed(calls, draw, args.rounds, device)
            best_stock = min((value, name) for name, value in times.items() if name.startswith("stock"))
            row = [dtype_name, tokens, f"{best_stock[0] * 1e3:.2f}", best_stock[1].split()[1]]
            for multiple, block in blocks.items():
                for name in ("eager", "grouped_mm"):
                    row.append(f"{times[f'pruned/{multiple} {name}'] / best_stock[0]:.2f}")
            rows.append(row)
    header = ["dtype", "tokens", "stock ms", "stock best"]
    for multiple, block in blocks.items():
        share = sum(block.widths) / (args.width * args.experts)
        header += [f"x{multiple} kept {share:.2f} eager", "grouped"]
    print(f"{args.device}, {torch.get_num_threads()} threads, hidden {args.hidden}, {args.experts} x {args.width}")
    print(table(header, rows))


if __name__ == "__main__":
    main()
