# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr frontier`: what every ratio, criterion and layout would give, from one statistics file."""

from __future__ import annotations

import shlex
from argparse import ArgumentTypeError, Namespace
from typing import TYPE_CHECKING, Any

from ..configuration import GOALS, HeaprConfig
from ..utils.errors import HeaprError
from ..utils.files import check_output_is_not_input
from .base import HeaprSubcommand
from .options import (
    LOADING_OPTIONS,
    PLANNING_OPTIONS,
    add_config_options,
    add_loading_options,
    config_flags,
    config_from,
    flags_of,
    given,
    model_options_from,
    number,
)


if TYPE_CHECKING:
    from ..frontier import FrontierPoint


MOST_RATIOS = 200


class FrontierCommand(HeaprSubcommand):
    NAME = "frontier"
    HELP = "Show size against loss for many ratios, criteria and layouts, from one statistics file."

    @staticmethod
    def parse_args(parser):
        parser.add_argument(
            "-s", "--statistics", required=True, help="statistics file of 'calibrate', or a folder or name on the Hub"
        )
        parser.add_argument(
            "--ratios",
            default="0.05:0.9:0.05",
            help="FIRST:LAST:STEP, or ratios with commas between (default: %(default)s)",
        )
        parser.add_argument("--criteria", nargs="+", metavar="NAME", help="criteria to compare (default: --criterion)")
        parser.add_argument("--layouts", nargs="+", metavar="NAME", help="layouts to compare (default: --layout)")
        parser.add_argument(
            "--experts",
            nargs="+",
            metavar="N",
            help="numbers of experts to compare, or 'all', in the layout uniform (default: --num-experts)",
        )
        parser.add_argument(
            "-o", "--output", metavar="DIR", help="write frontier.json there, and the chart as SVG: loss against size"
        )
        parser.add_argument("--overwrite", action="store_true", help="replace what this package wrote there")
        measuring = parser.add_argument_group(
            "Measuring some of the points, which corrects the estimates of the others"
        )
        measuring.add_argument(
            "--measure", metavar="TEXT", help="file, name on the Hub or protocol to measure on; needs --model"
        )
        measuring.add_argument(
            "-m",
            "--model",
            help="the unpruned model; it is masked, not cut, and compensated within experts if asked for",
        )
        measuring.add_argument("--windows", type=int, help="windows of the text (default: 24)")
        measuring.add_argument("--window-length", type=int, help="tokens in a window (default: 512)")
        measuring.add_argument(
            "--max-loss-increase",
            type=number,
            metavar="NATS",
            help="choose the smallest model that measurably costs no more, mark it, and print the command that makes it",
        )
        measuring.add_argument("--points", type=int, help="measured of each curve (default: 5)")
        add_loading_options(parser)
        names = [name for name in PLANNING_OPTIONS if name not in GOALS]
        add_config_options(parser, (*names, "seed"))

    def execute(self) -> Any:
        from ..utils.files import check_output_folder, replace_folder, write_json

        args = self.args
        config = config_from(args, varied={"criterion": args.criteria})
        if (args.measure is None) != (args.model is None):
            raise HeaprError(
                f"measure={args.measure!r}, model={args.model!r}: --measure and --model go together; give both, or neither"
            )
        if args.model is None:
            measuring = given(args, "max_loss_increase", "windows", "window_length", "points") | loading_given(args)
            if measuring:
                name = next(iter(measuring))
                raise HeaprError(
                    f"{name}={measuring[name]}: is about measuring; add --measure and --model, or leave it out"
                )
        ratios = ratios_of(args.ratios)
        bound = args.max_loss_increase
        if bound is not None and not bound > 0:
            raise HeaprError(f"max_loss_increase={bound}: must be above 0")
        experts = {} if args.experts is None else {"num_experts": [expert_number(text) for text in args.experts]}
        if args.output:
            check_output_is_not_input(args.output, args.statistics, args.model, args.measure, args.config)
            check_output_folder(args.output, args.overwrite)
        from ..frontier import frontier, smallest_within
        from ..hub.statistics import load_statistics
        from ..report.frontier_chart import frontier_charts

        statistics = load_statistics(args.statistics)
        measure = None
        if args.measure is not None:
            from ..checkpoints.loading import load_model
            from ..measuring import text_measure

            model, tokenizer = load_model(args.model, **model_options_from(args))
            windows = given(args, "windows", "window_length")
            measure = text_measure(model, tokenizer, statistics, config, args.measure, **windows)
        compared = given(args, "criteria", "layouts", "points", "max_loss_increase") | experts
        points = frontier(statistics, config, ratios, measure=measure, **compared)
        found: dict[str, Any] = {"points": [point.to_dict() for point in points]}
        if bound is not None:
            chosen = smallest_within(points, bound)
            command = None if chosen is None else prune_command(args, chosen.config(config))
            found |= {"max_loss_increase": bound, "chosen": chosen and chosen.to_dict(), "command": command}
        if args.output:
            with replace_folder(args.output, args.overwrite) as folder:
                write_json(folder / "frontier.json", found)
                for name, chart in frontier_charts(found["points"], found.get("chosen")).items():
                    (folder / f"{name}.svg").write_text(chart, encoding="utf-8")
        self.show(frontier_text(points))
        if bound is not None:
            self.show(*chosen_lines(found, chosen))
        if args.output:
            print(f"Frontier written to {args.output}")
        return found


def chosen_lines(found: dict[str, Any], chosen: FrontierPoint | None) -> list[str]:
    """What was chosen, and the command that makes it."""
    head = f"chosen for a loss increase of at most {found['max_loss_increase']}: "
    if chosen is None:
        return [head + "none; ask for smaller ratios, or allow more"]
    what = f"{chosen.method_name()}, {chosen.ratio:.1%} removed (measured {_with_error(chosen)})"
    return [head + what, f"  {found['command']}"]


def loading_given(args: Namespace) -> dict[str, Any]:
    """The flags about loading a model that say something."""
    return {name: value for name, value in given(args, *LOADING_OPTIONS).items() if value != "auto"}


def prune_command(args: Namespace, config: HeaprConfig) -> str:
    """The command line that prunes as a config says, from the statistics and with the model of these arguments."""
    inputs = ["-m", args.model, "-s", args.statistics, *flags_of(loading_given(args))]
    measured = ["--eval-dataset", args.measure, "-o", "pruned"]
    return shlex.join(["optimum-cli", "heapr", "prune", *inputs, *config_flags(config), *measured])


def ratios_of(text: str) -> list[float]:
    """`0.1:0.9:0.05` as ratios from the first to the last, or the numbers between commas.

    Raises:
        HeaprError: if that is neither, or a ratio is not above 0 and below 1.
    """
    try:
        if text.count(":") == 2:
            first, last, step = map(number, text.split(":"))
            if not (last - first) / step < MOST_RATIOS:  # also for NaN
                raise HeaprError(f"ratios={text!r}: takes a larger STEP; at most {MOST_RATIOS} ratios can be had")
            ratios = [round(first + index * step, 10) for index in range(int((last - first) / step + 1e-9) + 1)]
        else:
            ratios = [float(number(part)) for part in text.split(",")]
    except (ArgumentTypeError, ZeroDivisionError) as error:
        raise HeaprError(f"ratios={text!r}: must be FIRST:LAST:STEP, such as 0.1:0.9:0.05, or 0.25,0.5") from error
    wrong = next((ratio for ratio in ratios if not 0 < ratio < 1), None)
    if wrong is not None or not ratios:
        raise HeaprError(f"ratios={text!r}: {'is empty' if wrong is None else wrong}; ratios are above 0 and below 1")
    return ratios


def expert_number(text: str) -> int | None:
    """A number of experts as `--experts` has it, `None` for all.

    Raises:
        HeaprError: if it is neither a number nor `all`.
    """
    if text == "all":
        return None
    if not (text.isdecimal() and int(text)):
        auto = "; --num-experts auto of 'prune' measures which is best" if text == "auto" else ""
        raise HeaprError(f"experts={text!r}: must be numbers such as 32 24 16, or all{auto}")
    return int(text)


def frontier_text(points: list[FrontierPoint]) -> str:
    """One line a plan, and how to read it."""
    from ..report.numbers import count, size
    from .tables import table

    measured = any(point.measured is not None for point in points)
    fewer = any(point.num_experts is not None for point in points)
    names = ["criterion", "layout", *(["experts"] if fewer else [])]
    header = [*names, "removed", "parameters", "active", "weights", "est. loss +"]
    rows = [
        [
            point.criterion,
            point.layout,
            *(["all" if point.num_experts is None else str(point.num_experts)] if fewer else []),
            f"{point.ratio:.1%}",
            count(point.parameters),
            count(point.active_parameters),
            "?" if point.num_bytes is None else size(point.num_bytes),
            f"{point.estimated:.4f}",
            *(
                ["?" if point.calibrated is None else f"{point.calibrated:.4f}", _with_error(point)]
                if measured
                else []
            ),
        ]
        for point in points
    ]
    if measured:
        note = "calibrated: the estimate, corrected by what was measured on the same curve."
        return f"{table([*header, 'calibrated', 'measured'], rows)}\n\n{note}"
    note = "Estimates are low, and each criterion's by its own measure: compare ratios, not criteria; --measure compares them."
    return f"{table(header, rows)}\n\n{note}"


def _with_error(point: FrontierPoint) -> str:
    return "" if point.measured is None else f"{point.measured:.4f} ± {point.error:.4f}"
