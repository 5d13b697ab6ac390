# Licensed under the Apache License, Version 2.0
"""Latency of one MoE block: variable widths against the stock block, both in one run.

    python benchmarks/moe_block.py --kept 0.4

Prints one table of ratios to the stock block. Stock runs its fastest implementation of those named in the table's last
column; so does the pruned block. Times are medians of interleaved runs.
"""

import argparse
import statistics
import time

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
def timed(calls: dict, seconds: float, device: torch.device) -> dict[str, float]:
    """Median seconds of each call, run in turn until the time is up."""
    samples = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(samples.values()))) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=float, default=0.4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 64, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each row")
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
            hidden = torch.randn(tokens, args.hidden, device=device, dtype=dtype)
            weights, index = torch.rand(tokens, args.experts, device=device).topk(args.top_k)
            weights = (weights / weights.sum(1, keepdim=True)).to(dtype)

            def call(block, implementation, hidden=hidden, index=index, weights=weights):
                config._experts_implementation = implementation
                block(hidden, index, weights)

            names = ["eager", "grouped_mm"] + (["batched_mm"] if tokens <= 4 else [])
            calls = {f"stock {name}": lambda n=name: call(stock, n) for name in names}
            for multiple, block in blocks.items():
                for name in ("eager", "grouped_mm"):
                    calls[f"pruned/{multiple} {name}"] = lambda b=block, n=name: call(b, n)
            times = timed(calls, args.seconds, device)
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
