# Licensed under the Apache License, Version 2.0
"""Choosing the criterion for each expert, by what it would have lost on calibration tokens that were held out.

    python benchmarks/held_out_criterion.py --model MODEL --calibration calibration.jsonl \\
        --in-domain code=eval_code.jsonl prose=eval_prose.jsonl --output held_out.json

Three quarters of the samples give the statistics. The rest gives, for each expert and each criterion, the token Fisher of
the removal as a whole with its compensation C,

    1/2 sum_t (g_R . (h_R - C h_K))^2,     g = dL/dh,

for the atomic experts R that the criterion removes at the width that the allocation of the first criterion gives; the
criterion with the least of it orders that expert. All rows are compensated by the statistics of the three quarters.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from quality import Increase, evaluation_windows, named_paths, window_losses

from optimum_heapr import HeaprConfig
from optimum_heapr.calibration import tap
from optimum_heapr.calibration.data import load_calibration_data
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.criteria.elimination import ridge_for_tokens
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.loading import load_model
from optimum_heapr.planning.allocation import allocate
from optimum_heapr.surgery.compensation import compensate_experts, compensation_weights


RIDGE = 0.01


class RowsAccumulator(tap.BlockAccumulator):
    """Also keeps activations and gradients of every token, by expert."""

    def __init__(self, num_experts: int, *args, **options):
        super().__init__(num_experts, *args, **options)
        self.rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(num_experts)]

    def add(self, activation: torch.Tensor, gradient: torch.Tensor, routed) -> None:
        super().add(activation, gradient, routed)
        for rows, h, g in zip(self.rows, activation.split(routed.counts), gradient.split(routed.counts)):
            if len(h):
                rows.append((h.clone(), g.clone()))


def held_out_rows(model, data, batch_size: int) -> dict[str, list[tuple[torch.Tensor, torch.Tensor] | None]]:
    """By block, for each expert its activations and gradients on `data`."""
    made: list[RowsAccumulator] = []

    def accumulator(*args, **options):
        made.append(RowsAccumulator(*args, **options))
        return made[-1]

    original, tap.BlockAccumulator = tap.BlockAccumulator, accumulator
    try:
        calibrate(model, data, batch_size)
    finally:
        tap.BlockAccumulator = original
    return {
        block.path: [tuple(map(torch.cat, zip(*rows))) if rows else None for rows in sums.rows]
        for block, sums in zip(find_expert_blocks(model), made)
    }


def held_out_loss(
    rows: tuple[torch.Tensor, torch.Tensor], gram: torch.Tensor, kept: torch.Tensor, tokens: int
) -> float:
    h, g = rows
    stays = torch.zeros(len(gram), dtype=torch.bool).index_fill_(0, kept, True)
    lost = h[:, ~stays]
    if len(kept) and tokens:
        weights = compensation_weights(gram, kept, ridge_for_tokens(RIDGE, len(gram), tokens))
        lost = lost - h[:, kept] @ weights.T
    return float(0.5 * (g[:, ~stays] * lost).sum(1).square().sum())


@torch.no_grad()
def cut(model, statistics, kept: dict[str, list[torch.Tensor]]) -> None:
    """Sets the columns of what goes to zero and compensates, in place."""
    for block in find_expert_blocks(model):
        weight, own = block.module.down_proj, statistics.blocks[block.path]
        results = compensate_experts(
            weight, own.mean("activation_gram_sum"), kept[block.path], own.token_count.tolist(), RIDGE
        )
        weight.zero_()
        for expert, result in enumerate(results):
            weight[expert][:, kept[block.path][expert]] = result.down_proj


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--in-domain", nargs="+", required=True, metavar="NAME=PATH", help="evaluation texts")
    parser.add_argument("--out-of-domain", nargs="*", default=[], metavar="NAME=PATH", help="evaluation texts")
    parser.add_argument("-o", "--output", default="held_out.json")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 0.7])
    parser.add_argument("--criteria", nargs="+", default=["obs", "fisher", "heapr"])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=24, help="evaluation windows of each text")
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()

    model, tokenizer = load_model(args.model, dtype="float32")
    options = {"num_samples": args.num_samples, "seq_length": args.seq_length}
    data = load_calibration_data(HeaprConfig(dataset=args.calibration, **options), tokenizer)
    share = 3 * len(data.samples) // 4
    statistics = calibrate(model, replace(data, samples=data.samples[:share], origins=[]), args.batch_size, gram=True)
    rows = held_out_rows(model, replace(data, samples=data.samples[share:], origins=[]), args.batch_size)
    in_domain, out_of_domain = named_paths(args.in_domain), named_paths(args.out_of_domain)
    domains = {"in domain": list(in_domain), **({"out of domain": list(out_of_domain)} if out_of_domain else {})}
    windows = {
        name: evaluation_windows(path, tokenizer, args.rows, args.seq_length)
        for name, path in {**in_domain, **out_of_domain}.items()
    }
    base = window_losses(model, windows, args.batch_size)
    scores = {name: statistics.importance(name) for name in args.criteria}
    original = {block.path: block.module.down_proj.detach().clone() for block in find_expert_blocks(model)}
    records = []
    for ratio in args.ratios:
        plans = {
            name: allocate(scores[name], HeaprConfig(ratio=ratio, criterion=name), statistics.unreached)
            for name in args.criteria
        }
        chosen: dict[str, list[torch.Tensor]] = {}
        taken: Counter = Counter()
        for path, block in statistics.blocks.items():
            grams, chosen[path] = block.mean("activation_gram_sum"), []
            for expert, first in enumerate(plans[args.criteria[0]][path]):
                options = {
                    name: scores[name][path][expert].topk(len(first)).indices.sort().values for name in args.criteria
                }
                best = args.criteria[0]
                if rows[path][expert] is not None and 0 < len(first) < block.width:
                    tokens = int(block.token_count[expert])
                    best = min(
                        options,
                        key=lambda name: held_out_loss(rows[path][expert], grams[expert], options[name], tokens),
                    )
                    taken[best] += 1
                chosen[path].append(options[best])
        print(f"{ratio:.0%}  experts by criterion: {dict(taken)}")
        for name, plan in {**plans, "by held-out tokens": chosen}.items():
            cut(model, statistics, plan)
            losses = window_losses(model, windows, args.batch_size)
            for block in find_expert_blocks(model):
                block.module.down_proj.data.copy_(original[block.path])
            found = {domain: Increase.over(losses, base, windows, sets) for domain, sets in domains.items()}
            print(f"{ratio:.0%}  {name:18s} " + "  ".join(f"{k} {v}" for k, v in found.items()), flush=True)
            increase = {domain: vars(value) for domain, value in found.items()}
            records.append({"criterion": name, "ratio": ratio, "taken": dict(taken), "increase": increase})
            Path(args.output).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
