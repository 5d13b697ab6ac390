# Licensed under the Apache License, Version 2.0
"""What second-order statistics, elimination and compensation cost for one layer of random numbers.

    python benchmarks/second_order_cost.py --experts 128 --width 768 --hidden-size 2048 --top-k 8 --tokens 262144

The accumulation is timed on a share of the tokens and scaled; everything else runs in full. Times are processor seconds
on a CPU, where they do not depend on what else runs, and wall seconds elsewhere.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from optimum_heapr.calibration.tap import BlockAccumulator, _RoutedRows
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=262144, help="calibration tokens")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the width that stays")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)

    rows_each = 1024  # enough to be representative: an expert's rows of a large micro-batch
    rows = args.experts * rows_each
    h, g = torch.randn(2, rows, args.width, device=device)
    routed = _RoutedRows([rows_each] * args.experts, torch.ones(rows, device=device), None)
    routed.output_norm = torch.ones(rows, device=device)
    times = {}
    for gram in (False, True):
        sums = BlockAccumulator(args.experts, args.width, device, gram=gram)
        sums.add(h, g, routed)  # warm
        times[gram] = seconds(lambda: sums.add(h, g, routed), device)[0] * args.tokens * args.top_k / rows
    count = int(sums.token_count[0])
    grams = sums.activation_gram_sum / count, sums.gradient_gram_sum / count
    elimination, found = seconds(lambda: greedy_elimination(*grams), device)
    kept = list(found.order[:, -round(args.keep * args.width) :].sort(dim=1).values)
    weights = torch.randn(args.experts, args.hidden_size, args.width, device=device)
    compensation, _ = seconds(lambda: compensate_experts(weights, grams[0], kept, [10**6] * args.experts), device)

    flops = 4 * args.width**2 * args.tokens * args.top_k
    size = 8 * args.experts * args.width**2
    print(f"one layer of {args.experts} experts x {args.width}, hidden size {args.hidden_size}, on {device}")
    print(f"vector statistics, {args.tokens:,} tokens x {args.top_k}: {times[False]:.1f} s")
    print(f"second-order statistics, the same: {times[True]:.1f} s, {flops / 1e12:.1f} TFLOP, {size / 1e9:.2f} GB")
    print(f"elimination: {elimination:.1f} s")
    print(f"compensation, width {len(kept[0])}: {compensation:.1f} s")


if __name__ == "__main__":
    main()
