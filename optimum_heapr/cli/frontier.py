# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr frontier`: what every ratio, criterion and layout would give, from one statistics file."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import TYPE_CHECKING, Any

from ..configuration import GOALS
from ..utils.errors import HeaprError
from .base import HeaprSubcommand
from .checks import check_output_is_not_input
from .options import (
    PLANNING_OPTIONS,
    add_config_options,
    add_loading_options,
    config_from,
    model_options_from,
    number,
)


if TYPE_CHECKING:
    from ..frontier import FrontierPoint


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
        measuring.add_argument("--windows", type=int, default=24, help="windows of the text (default: %(default)s)")
        measuring.add_argument(
            "--window-length", type=int, default=512, help="tokens in a window (default: %(default)s)"
        )
        measuring.add_argument(
            "--max-loss-increase",
            type=number,
            metavar="NATS",
            help="choose the smallest model that costs no more, and mark it",
        )
        measuring.add_argument("--points", type=int, default=5, help="measured of each curve (default: %(default)s)")
        add_loading_options(parser)
        names = [name for name in PLANNING_OPTIONS if name not in GOALS]
        add_config_options(parser, (*names, "seed"))

    def execute(self) -> Any:
        from ..utils.files import check_output_folder, replace_folder, write_json

        args = self.args
        config = config_from(args)
        if (args.measure is None) != (args.model is None):
            raise HeaprError(
                f"measure={args.measure!r}, model={args.model!r}: --measure and --model go together; give both, or neither"
            )
        if args.max_loss_increase is not None and args.measure is None:
            raise HeaprError(
                f"max_loss_increase={args.max_loss_increase}: is chosen by what was measured; add --measure and --model"
            )
        ratios = ratios_of(args.ratios)
        if args.output:
            check_output_is_not_input(args.output, args.statistics, args.model, args.measure, args.config)
            check_output_folder(args.output, args.overwrite)
        from ..checkpoints.loading import load_model
        from ..frontier import frontier, smallest_within
        from ..hub.statistics import load_statistics
        from ..measuring import text_measure
        from ..report.frontier_chart import frontier_charts

        statistics = load_statistics(args.statistics)
        measure = None
        if args.measure is not None:
            model, tokenizer = load_model(args.model, **model_options_from(args))
            windows = args.windows, args.window_length
            measure = text_measure(model, tokenizer, statistics, config, args.measure, *windows)
        points = frontier(statistics, config, ratios, args.criteria, args.layouts, measure, args.points)
        chosen = None if args.max_loss_increase is None else smallest_within(points, args.max_loss_increase)
        written = [point.to_dict() for point in points]
        if args.output:
            with replace_folder(args.output, args.overwrite) as folder:
                write_json(folder / "frontier.json", written)
                for name, chart in frontier_charts(written, chosen and chosen.to_dict()).items():
                    (folder / f"{name}.svg").write_text(chart, encoding="utf-8")
        self.show(frontier_text(points))
        if args.max_loss_increase is not None:
            what = "none"
            if chosen:
                known = (
                    "calibrated, not measured itself" if chosen.measured is None else f"measured {_with_error(chosen)}"
                )
                what = f"{chosen.criterion}, {chosen.layout}, {chosen.ratio:.1%} removed ({known})"
            print(f"chosen for a loss increase of at most {args.max_loss_increase}: {what}")
        if args.output:
            print(f"Frontier written to {args.output}")
        return written


def ratios_of(text: str) -> list[float]:
    """`0.1:0.9:0.05` as ratios from the first to the last, or the numbers between commas.

    Raises:
        HeaprError: if that is neither, or a ratio is not above 0 and below 1.
    """
    try:
        if text.count(":") == 2:
            first, last, step = map(number, text.split(":"))
            ratios = [round(first + index * step, 10) for index in range(int((last - first) / step + 1e-9) + 1)]
        else:
            ratios = [float(number(part)) for part in text.split(",")]
    except (ArgumentTypeError, ZeroDivisionError) as error:
        raise HeaprError(f"ratios={text!r}: must be FIRST:LAST:STEP, such as 0.1:0.9:0.05, or 0.25,0.5") from error
    wrong = next((ratio for ratio in ratios if not 0 < ratio < 1), None)
    if wrong is not None or not ratios:
        raise HeaprError(f"ratios={text!r}: {'is empty' if wrong is None else wrong}; ratios are above 0 and below 1")
    return ratios


def frontier_text(points: list[FrontierPoint]) -> str:
    """One line a plan, and how to read it."""
    from ..report.numbers import count, size
    from .tables import table

    measured = any(point.measured is not None for point in points)
    header = ["criterion", "layout", "removed", "parameters", "active", "weights", "est. loss +"]
    rows = [
        [
            point.criterion,
            point.layout,
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
