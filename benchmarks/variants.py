# Licensed under the Apache License, Version 2.0
"""Every choice inside `obs` and compensation against the others, one changed at a time: what the defaults rest on.

    python benchmarks/variants.py --model MODEL --calibration calibration.jsonl \\
        --in-domain code=eval_code.jsonl prose=eval_prose.jsonl --output variants

All rows are compensated and share one calibration pass, which measures a few matrices more than the package keeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

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
from optimum_heapr.criteria import ranked_below_reached
from optimum_heapr.criteria.elimination import greedy_elimination, ridge_for_tokens
from optimum_heapr.criteria.obs import TOKEN_DEPENDENCE, scores_of_order, token_dependence
from optimum_heapr.planning.allocation import allocate


class Accumulator(tap.BlockAccumulator):
    """Also sums, for each expert, the other matrices that could stand in the place of `A`."""

    def __init__(self, num_experts: int, width: int, *args, **options):
        super().__init__(num_experts, width, *args, **options)
        names = ("no router weight", "gradient norm", "damped", "normed", "mask Fisher")
        self.others = {name: torch.zeros(num_experts, width, width) for name in names}

    def add(self, activation: torch.Tensor, gradient: torch.Tensor, routed) -> None:
        super().add(activation, gradient, routed)
        parts = (
            activation.split(routed.counts),
            gradient.split(routed.counts),
            routed.router_weight.split(routed.counts),
        )
        for expert, (h, g, router_weight) in enumerate(zip(*parts)):
            if len(h) == 0:
                continue
            weighted = h * router_weight[:, None]
            norm = weighted.square().sum(1, keepdim=True)
            for name, rows in {
                "no router weight": h,
                "gradient norm": h * g.norm(dim=1, keepdim=True),
                "damped": weighted / (norm + norm.median()).sqrt(),
                "normed": weighted / norm.clamp(min=1e-30).sqrt(),
                "mask Fisher": h * g,
            }.items():
                self.others[name][expert].addmm_(rows.T, rows)


@dataclass
class Variant:
    """One choice changed: what `A` is in the elimination and in compensation, and what becomes of the scores.

    `tokens` is the power of an expert's token count that its costs are multiplied by.
    """

    elimination: str = "A"
    compensation: str = "A"
    dependence: float = TOKEN_DEPENDENCE
    ridge: float = RIDGE
    tokens: float = 1.0
    scores: Callable[[torch.Tensor], torch.Tensor] | None = None
    options: dict | None = None


VARIANTS = {
    "as it is": Variant(),
    "no token dependence": Variant(dependence=0),
    "all of the token dependence": Variant(dependence=1),
    "ridge 0.001": Variant(ridge=0.001),
    "ridge 0.05": Variant(ridge=0.05),
    "ridge 0.2": Variant(ridge=0.2),
    "A without router weight": Variant("no router weight", "no router weight"),
    "A without router weight, in compensation alone": Variant(compensation="no router weight"),
    "A by gradient norm": Variant("gradient norm", "gradient norm"),
    "A by gradient norm, in elimination alone": Variant("gradient norm"),
    "A damped": Variant("damped", "damped"),
    "A normed": Variant("normed", "normed"),
    "cost by root of tokens": Variant(tokens=0.5),
    "layers by root of mean": Variant(scores=lambda score: score / score.mean().sqrt()),
    "layers by mean": Variant(scores=lambda score: score / score.mean()),
    "mask Fisher": Variant("mask Fisher"),
    "width multiple 4": Variant(options={"width_multiple": 4}),
    "width multiple 8": Variant(options={"width_multiple": 8}),
    "width multiple 16": Variant(options={"width_multiple": 16}),
    "width multiple 32": Variant(options={"width_multiple": 32}),
    "min_width 8": Variant(options={"min_width": 8}),
    "by layer": Variant(options={"allocation": "layer"}),
}


def greedy_mask(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and cost [E, I] when the next to go is what adds least to `1/2 sum_{k,l removed} F_kl`."""
    experts = torch.arange(len(matrix))
    added = 0.5 * matrix.diagonal(dim1=1, dim2=2).clone()
    gone = torch.zeros_like(added, dtype=torch.bool)
    order, cost = [], []
    for _ in range(matrix.shape[1]):
        least, chosen = added.masked_fill(gone, torch.inf).min(dim=1)
        order.append(chosen)
        cost.append(least)
        gone[experts, chosen] = True
        added += matrix[experts, chosen]
    return torch.stack(order, 1), torch.stack(cost, 1).clamp(min=0)


def matrices(block, others: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What stands in the place of `A`, [E, I, I]; rows that were scaled to one size get the trace of `A` back."""
    ours = block.mean("activation_gram_sum")
    if name == "A":
        return ours
    other = block.per_token(others[name])
    if name in ("damped", "normed"):
        trace, own = (matrix.diagonal(dim1=1, dim2=2).sum(1) for matrix in (ours, other))
        other = other * (trace / own.clamp(min=1e-30))[:, None, None]
    return other


def scores(statistics, others, variant: Variant) -> dict[str, torch.Tensor]:
    found = {}
    for path, block in statistics.blocks.items():
        matrix = matrices(block, others[path], variant.elimination)
        if variant.elimination == "mask Fisher":
            order, cost = greedy_mask(matrix)
            weight = block.token_count.double()
        else:
            ridges = torch.tensor(
                [ridge_for_tokens(variant.ridge, block.width, count) for count in block.token_count.tolist()]
            )
            scale = token_dependence(block) ** (variant.dependence / 2)
            gradients = block.mean("gradient_gram_sum") * scale.unsqueeze(1) * scale.unsqueeze(2)
            elimination = greedy_elimination(matrix, gradients, ridges)
            order, cost = elimination.order, elimination.cost
            weight = block.token_count.double() ** variant.tokens / (1 + ridges)
        score = scores_of_order(order, cost.double() * weight[:, None])
        found[path] = score if variant.scores is None else variant.scores(score)
    return dict(ranked_below_reached(found.items(), statistics))


def main() -> None:
    parser = argument_parser(__doc__, "variants", ratios=(0.5, 0.7), resume=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    args = parser.parse_args()

    model, tokenizer = load(args)
    with accumulating(Accumulator) as made:
        statistics = calibrate(model, calibration_samples(args, tokenizer), args.batch_size, gram=True)
    others = {path: sums.others for path, sums in zip(statistics.blocks, made)}
    evaluation = Evaluation.of(args, model, tokenizer)
    about = {**evaluation.measured_on(), "calibration": statistics.fingerprint}
    results = Results(args.output, about, list(VARIANTS))
    if args.resume:
        results.resume()
    for name, ratio in itertools.product(args.variants, args.ratios):
        if results.has(name, ratio):
            continue
        variant = VARIANTS[name]
        importance = scores(statistics, others, variant)
        kept = allocate(importance, HeaprConfig(ratio=ratio, **(variant.options or {})), statistics.unreached)
        grams = {
            path: matrices(block, others[path], variant.compensation) for path, block in statistics.blocks.items()
        }
        with restored(model):
            zero_and_compensate(model, statistics, kept, grams, variant.ridge)
            results.add(method=name, ratio=ratio, **evaluation.measure(model))
    print("\n" + results.markdown())


if __name__ == "__main__":
    main()
