# Licensed under the Apache License, Version 2.0
"""What second-order statistics, elimination and compensation cost for one layer of random numbers.

    python benchmarks/second_order_cost.py --experts 128 --width 768 --hidden-size 2048 --top-k 8 --tokens 262144

The accumulation is timed on a share of the tokens and scaled; everything else runs in full. Times are processor seconds
on a CPU, where they do not depend on what else runs, and wall seconds elsewhere. The operations are counted as well, and
what they would take at `--tflops`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from optimum_heapr.calibration.accumulator import BlockAccumulator, RoutedRows
from optimum_heapr.criteria.elimination import greedy_elimination
from optimum_heapr.surgery.compensation import compensate_experts


def seconds(work: Callable[[], object], device: torch.device) -> tuple[float, object]:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


def operations(experts: int, width: int, hidden_size: int, kept: int, rows: int) -> tuple[float, float, float]:
    """Floating-point operations of statistics, elimination and compensation of one layer, as the code does them."""
    statistics = 4 * width**2 * rows  # two I x I products
    # The inverse, and for each of n = I, I - 1, ... remaining a rank-one update of it and a rank-two update of M.
    elimination = experts * (width**3 + 2 * width**3)
    removed = width - kept
    solve = kept**3 / 3 + 2 * kept**2 * removed + 2 * hidden_size * kept * removed
    errors = 2 * hidden_size * (2 * width**2 + removed**2)  # before and after, relative to the whole output
    return statistics, elimination, experts * (solve + errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=262144, help="calibration tokens")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the width that stays")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tflops", type=float, default=40, help="float32 rate of an accelerator to reckon with")
    args = parser.parse_args()
    device = torch.device(args.device)

    rows_each = 1024  # enough to be representative: an expert's rows of a large micro-batch
    rows = args.experts * rows_each
    h, g = torch.randn(2, rows, args.width, device=device)
    expert = torch.arange(args.experts, device=device).repeat_interleave(rows_each)
    routed = RoutedRows(expert, [rows_each] * args.experts, torch.ones(rows, device=device), None)
    routed.output_norm = torch.ones(rows, device=device)
    times = {}
    for gram in (False, True):
        sums = BlockAccumulator(args.experts, args.width, device, gram=gram)
        sums.add(h, g, routed)  # warm
        times[gram] = seconds(lambda: sums.add(h, g, routed), device)[0] * args.tokens * args.top_k / rows
    count = int(sums.token_count[0])
    sums.complete()
    grams = sums.activation_gram_sum / count, sums.gradient_gram_sum / count
    elimination, found = seconds(lambda: greedy_elimination(*grams), device)
    kept = list(found.order[:, -round(args.keep * args.width) :].sort(dim=1).values)
    weights = torch.randn(args.experts, args.hidden_size, args.width, device=device)
    compensation, _ = seconds(lambda: compensate_experts(weights, grams[0], kept, [10**6] * args.experts), device)

    rows = args.tokens * args.top_k
    size = 8 * args.experts * args.width**2
    print(f"one layer of {args.experts} experts x {args.width}, hidden size {args.hidden_size}, on {device}")
    print(f"vector statistics, {args.tokens:,} tokens x {args.top_k}: {times[False]:.1f} s")
    counts = operations(args.experts, args.width, args.hidden_size, len(kept[0]), rows)
    found = {
        f"second-order statistics, the same: {size / 1e9:.2f} GB": times[True],
        "elimination": elimination,
        f"compensation, width {len(kept[0])}": compensation,
    }
    for (name, taken), count in zip(found.items(), counts):
        print(
            f"{name}: {taken:.1f} s, {count / 1e12:.2f} TFLOP; at {args.tflops:g} TFLOP/s {count / args.tflops / 1e12:.3f} s"
        )


if __name__ == "__main__":
    main()
