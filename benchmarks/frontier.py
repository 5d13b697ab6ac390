# Licensed under the Apache License, Version 2.0
"""How far the corrected estimate of a frontier is from what is measured, at ratios that the correction did not see.

    python benchmarks/frontier.py --model PATH --calibration calibration.jsonl --in-domain code=eval_code.jsonl --output frontier

Measures every ratio of every curve, once; then makes each frontier as `optimum-cli heapr frontier --measure` does, with a few points of
these, and compares the others. Prints one table and writes it as `frontier.md`, everything measured as `frontier.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

from common import argument_parser, evaluation_windows, load, load_or_measure, named_paths

from optimum_heapr import HeaprConfig
from optimum_heapr.frontier import FrontierPoint, frontier
from optimum_heapr.measuring import loss_measure
from optimum_heapr.planning.plan import PruningPlan


CURVES: dict[str, dict] = {
    "heapr": {"criterion": "heapr"},
    "fisher": {"criterion": "fisher"},
    "reap": {"criterion": "reap"},
    "obs": {"criterion": "obs"},
    "obs, compensated": {"criterion": "obs", "compensate": True},
    "obs, uniform": {"criterion": "obs", "layout": "uniform"},
}
RATIOS = tuple(round(0.05 * step, 2) for step in range(1, 19))
TOLD = 0.2
"""What is measured with a larger error than this part of itself says nothing about an estimate."""


def main() -> None:
    parser = argument_parser(__doc__, "frontier", RATIOS, statistics=True, resume=True)
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--points", nargs="+", type=int, default=[4, 5], help="measured of each curve")
    args = parser.parse_args()

    model, tokenizer = load(args)
    statistics = load_or_measure(args, model, tokenizer)
    texts = [
        evaluation_windows(path, tokenizer, args.rows, args.seq_length)
        for path in named_paths(args.in_domain).values()
    ]
    measure = loss_measure(model, [window for text in texts for window in text.ids], "evaluation", statistics)
    output = Path(f"{args.output}.json")
    measured = json.loads(output.read_text()) if args.resume and output.is_file() else {}

    def known(plan: PruningPlan, curve: str) -> tuple[float, float]:
        """As `measure`, once for each plan, also of an earlier run."""
        found = measured.setdefault(curve, {})
        if (ratio := f"{plan.ratio:.6f}") not in found:
            found[ratio] = measure(plan)
            print(f"{curve:20s} {plan.ratio:.2%}  {found[ratio][0]:.5f} +- {found[ratio][1]:.5f}", flush=True)
            output.write_text(json.dumps(measured, indent=1) + "\n")
        return tuple(found[ratio])

    rows = [
        "| curve | points measured | others | largest error | mean error | measured over the estimate alone |",
        "|---" * 6 + "|",
    ]
    for curve in args.curves:
        config = HeaprConfig(**CURVES[curve])
        for points in args.points:
            found = frontier(statistics, config, args.ratios, measure=lambda plan: known(plan, curve), points=points)
            rows.append(
                f"| {curve} | {points} | "
                + compared(found, lambda plan: known(plan, curve), statistics, config)
                + " |"
            )
    table = "\n".join(rows) + "\n"
    Path(f"{args.output}.md").write_text(table)
    print(table)


def compared(found: list[FrontierPoint], known, statistics, config: HeaprConfig) -> str:
    """How many ratios were not seen and can be told from noise, of how many; and how far the frontier is from them."""
    unseen = [point for point in found if point.measured is None]
    truth = [known(PruningPlan.build(statistics, point.config(config))) for point in unseen]
    told = [(point, increase) for point, (increase, error) in zip(unseen, truth) if error < TOLD * increase]
    errors = [point.calibrated / increase - 1 for point, increase in told]
    factors = [increase / point.estimated for point, increase in told]
    if not told:
        return f"0 of {len(unseen)} | | |"
    worst = max(errors, key=abs)
    mean = sum(map(abs, errors)) / len(errors)
    return f"{len(told)} of {len(unseen)} | {worst:+.0%} | {mean:.0%} | {min(factors):.1f} to {max(factors):.1f}"


if __name__ == "__main__":
    main()
