# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr inspect`: what a statistics file, a plan or a pruned model holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import HeaprSubcommand


if TYPE_CHECKING:
    from ..planning.comparison import BlockComparison
    from ..planning.plan import PruningPlan


class InspectCommand(HeaprSubcommand):
    NAME = "inspect"
    HELP = "Print a statistics file, a plan or the report of a pruned model as tables, or compare two plans."

    @staticmethod
    def parse_args(parser):
        parser.add_argument("path", help="statistics file, plan file, report.json, or folder of a pruned model")
        parser.add_argument(
            "other",
            nargs="?",
            help="a second plan of the same model, or a folder that holds one: what both keep, layer by layer",
        )

    def execute(self) -> Any:
        from ..calibration.statistics import FORMAT as STATISTICS_FORMAT
        from ..calibration.statistics import AtomicStatistics
        from ..planning.plan import PruningPlan
        from ..report.files import read_report
        from ..utils.artefacts import artefact_format
        from ..utils.companions import PLAN_NAME, REPORT_NAME, own_file
        from .documents import plan_document, statistics_document
        from .lines import rectangle_lines, search_lines
        from .tables import importance_table, report_text, size_line, statistics_table

        if self.args.other is not None:
            return compared(self, self.args.path, self.args.other)
        path = Path(self.args.path)
        if path.is_dir():
            report = own_file(path, REPORT_NAME)
            path = report if report.is_file() else own_file(path, PLAN_NAME)
        if path.suffix == ".json":
            report = read_report(path)
            self.show(report_text(report))
            return report
        if artefact_format(path) == STATISTICS_FORMAT:
            statistics = AtomicStatistics.load(path, "np")
            self.show(statistics_table(statistics), importance_table(statistics), sep="\n\n")
            return statistics_document(statistics)
        plan = PruningPlan.load(path, "np")
        found = plan_document(plan)
        lines = "\n".join([size_line(plan), *search_lines(plan), *rectangle_lines(plan)])
        self.show(report_text(found), lines, sep="\n\n")
        return found


def compared(command: HeaprSubcommand, *paths: str) -> Any:
    """Shows what two plans keep, and gives what `--json` prints of it."""
    from ..planning.comparison import compare_plans
    from ..planning.plan import PruningPlan
    from .documents import comparison_document

    plans = [PruningPlan.load(path, "np") for path in paths]
    blocks = compare_plans(*plans)
    command.show(comparison_table(*plans, blocks))
    return comparison_document(blocks)


def comparison_table(first: PruningPlan, second: PruningPlan, compared: list[BlockComparison]) -> str:
    """What two plans keep, each and both, layer by layer."""
    from .tables import table

    rows = [
        [
            block.path,
            *(f"{kept / block.total:.1%}" for kept in block.kept),
            f"{block.both / block.total:.1%}",
            f"{block.overlap:.2f}",
            f"{block.by_chance:.2f}",
            *(f"{least}-{most}" for least, most in block.widths),
            *(f"{loss:.5f}" for loss in block.loss_increase),
        ]
        for block in compared
    ]
    header = [
        "block",
        "first keeps",
        "second",
        "both",
        "overlap",
        "by chance",
        "widths, first",
        "second",
        "est. loss +, first",
        "second",
    ]
    asked = [f"{name}: {plan.in_words()}" for name, plan in (("first", first), ("second", second))]
    note = "overlap: kept by both, of what either keeps; by chance: that of random sets of these sizes."
    if first.config.criterion != second.config.criterion:
        note += " Estimates of two criteria do not compare."
    return "\n".join([table(header, rows), "", *asked, note])
