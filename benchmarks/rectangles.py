# Licensed under the Apache License, Version 2.0
"""What a number of experts and a width lose at one size: fewer and wider, or more and narrower, in the stock architecture.

    python benchmarks/rectangles.py --model PATH --calibration calibration.jsonl \\
        --in-domain code=eval_code.jsonl --out-of-domain sql=eval_sql.jsonl --rectangles 32x48 24x64 16x96

Each is planned with `num_experts` and the ratio that gives the width, and measured twice: as it is cut, and with the down
projections of each block fitted together under the new routing. Prints a table and writes it as `rectangles.md`,
everything measured as `rectangles.json`.
"""

from __future__ import annotations

import time

from common import Evaluation, Results, argument_parser, calibration_samples, load, load_or_measure, prune

from optimum_heapr.experts import find_expert_blocks


def main() -> None:
    parser = argument_parser(__doc__, "rectangles", statistics=True, resume=True)
    parser.add_argument("--rectangles", nargs="+", required=True, metavar="EXPERTSxWIDTH")
    parser.add_argument(
        "--criteria", nargs="+", default=["obs"], help="what ranks experts, and atomic experts in them"
    )
    args = parser.parse_args()
    model, tokenizer = load(args)
    statistics = load_or_measure(args, model, tokenizer)
    evaluation = Evaluation.of(args, model, tokenizer)
    data, block = calibration_samples(args, tokenizer), find_expert_blocks(model)[0]
    about = {
        **evaluation.measured_on(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "calibration": statistics.fingerprint,
    }
    fits = {"": {}, ", fitted": {"compensate": True, "compensation_scope": "block", "batch_size": args.batch_size}}
    names = [
        f"{rectangle}, {criterion}{fit}"
        for rectangle in args.rectangles
        for criterion in args.criteria
        for fit in fits
    ]
    results = Results(args.output, about, names)
    if args.resume:
        results.resume()
    for rectangle in args.rectangles:
        experts, width = map(int, rectangle.split("x"))
        ratio = 1 - experts * width / (block.num_experts * block.width)
        for criterion in args.criteria:
            for name, fit in fits.items():
                method = f"{rectangle}, {criterion}{name}"
                if results.has(method, round(ratio, 4)):
                    continue
                options = {"criterion": criterion, "layout": "uniform", "num_experts": experts, **fit}
                start = time.perf_counter()
                pruned, plan = prune(model, statistics, options, ratio, data)
                seconds = time.perf_counter() - start
                assert {width} == {kept for widths in plan.routed_widths.values() for kept in widths}
                results.add(
                    method=method,
                    ratio=round(ratio, 4),
                    options=options,
                    parameters=sum(parameter.numel() for parameter in pruned.parameters()),
                    **evaluation.measure(pruned),
                    estimated_increase=plan.estimated_loss_increase,
                    seconds=seconds,
                    versions=None,
                )
    print("\n" + results.markdown())


if __name__ == "__main__":
    main()
