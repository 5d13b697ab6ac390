# Licensed under the Apache License, Version 2.0
"""Pruning in rounds: part of the atomic experts, calibration of what is left, and the next part.

    python benchmarks/progressive.py --model MODEL --calibration calibration.jsonl \\
        --in-domain code=eval_code.jsonl prose=eval_prose.jsonl --rounds 1 2 --output progressive

Every round removes the same number and is compensated by its own statistics. What was removed stays in place with weights of
zero, so that its scores are zero and it stays at the bottom of every order.
"""

from __future__ import annotations

import itertools

import torch
from common import (
    Evaluation,
    Results,
    argument_parser,
    calibration_samples,
    load,
    load_or_measure,
    restored,
    zero_and_compensate,
)

from optimum_heapr import HeaprConfig
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.criteria import importance
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.planning.allocation import allocate


@torch.no_grad()
def silence(model, kept: dict[str, list[torch.Tensor]]) -> None:
    """Sets the gate and up weights of what goes to zero, so that its activation is."""
    for block in find_expert_blocks(model):
        concatenated = block.module.gate_up_proj.view(block.num_experts, 2, block.width, -1)
        for expert, indices in enumerate(kept[block.path]):
            goes = torch.ones(block.width, dtype=torch.bool).index_fill_(0, indices, False)
            concatenated[expert][:, goes] = 0


def main() -> None:
    parser = argument_parser(__doc__, "progressive", statistics=True, resume=True)
    parser.add_argument("--criteria", nargs="+", default=["obs", "fisher"])
    parser.add_argument("--rounds", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()

    model, tokenizer = load(args)
    data = calibration_samples(args, tokenizer)
    unpruned = load_or_measure(args, model, tokenizer)
    evaluation = Evaluation.of(args, model, tokenizer)
    runs = {
        f"{criterion}, {rounds} round{'s' * (rounds > 1)}": (criterion, rounds)
        for criterion, rounds in itertools.product(args.criteria, args.rounds)
    }
    results = Results(args.output, {**evaluation.measured_on(), "calibration": unpruned.fingerprint}, list(runs))
    if args.resume:
        results.resume()
    for (name, (criterion, rounds)), ratio in itertools.product(runs.items(), args.ratios):
        if results.has(name, ratio):
            continue
        with restored(model):
            for part in range(1, rounds + 1):
                statistics = unpruned if part == 1 else calibrate(model, data, args.batch_size, gram=True)
                config = HeaprConfig(ratio=ratio * part / rounds, criterion=criterion)
                kept = allocate(importance(statistics, criterion), config, unpruned.unreached)
                zero_and_compensate(model, statistics, kept)
                silence(model, kept)
            results.add(method=name, ratio=ratio, **evaluation.measure(model))
    print("\n" + results.markdown())


if __name__ == "__main__":
    main()
