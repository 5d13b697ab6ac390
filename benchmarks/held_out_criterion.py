# Licensed under the Apache License, Version 2.0
"""Choosing the criterion for each expert, by what it would have lost on calibration tokens that were held out.

    python benchmarks/held_out_criterion.py --model MODEL --calibration calibration.jsonl \\
        --in-domain code=eval_code.jsonl prose=eval_prose.jsonl --output held_out

Three quarters of the samples give the statistics. The rest gives, for each expert and each criterion, the token Fisher of
the removal as a whole with its compensation C,

    1/2 sum_t (g_R . (h_R - C h_K))^2,     g = dL/dh,

for the atomic experts R that the criterion removes at the width that the allocation of the first criterion gives; the
criterion with the least of it orders that expert. All rows are compensated by the statistics of the three quarters.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from common import (
    RIDGE,
    Evaluation,
    Results,
    accumulating,
    argument_parser,
    calibration_samples,
    load,
    restored,
    zero_and_compensate,
)

from optimum_heapr import HeaprConfig
from optimum_heapr.calibration import tap
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.criteria import importance
from optimum_heapr.criteria.elimination import ridge_for_tokens
from optimum_heapr.planning.allocation import allocate
from optimum_heapr.surgery.regression import compensation_weights


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
    with accumulating(RowsAccumulator) as made:
        blocks = calibrate(model, data, batch_size).blocks
    return {
        path: [tuple(map(torch.cat, zip(*rows))) if rows else None for rows in sums.rows]
        for path, sums in zip(blocks, made)
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


def main() -> None:
    parser = argument_parser(__doc__, "held_out", resume=True)
    parser.add_argument("--criteria", nargs="+", default=["obs", "fisher", "heapr"])
    args = parser.parse_args()

    model, tokenizer = load(args)
    data = calibration_samples(args, tokenizer)
    share = 3 * len(data.samples) // 4
    statistics = calibrate(model, replace(data, samples=data.samples[:share], origins=[]), args.batch_size, gram=True)
    rows = held_out_rows(model, replace(data, samples=data.samples[share:], origins=[]), args.batch_size)
    evaluation = Evaluation.of(args, model, tokenizer)
    about = {**evaluation.measured_on(), "calibration": statistics.fingerprint}
    results = Results(args.output, about, [*args.criteria, "by held-out tokens"])
    if args.resume:
        results.resume()
    scores = {name: importance(statistics, name) for name in args.criteria}
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
            if results.has(name, ratio):
                continue
            with restored(model):
                zero_and_compensate(model, statistics, plan)
                results.add(method=name, ratio=ratio, taken=dict(taken), **evaluation.measure(model))
    print("\n" + results.markdown())


if __name__ == "__main__":
    main()
