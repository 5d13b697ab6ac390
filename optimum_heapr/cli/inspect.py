# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr inspect`: what a statistics file, a plan or a pruned model holds."""

from __future__ import annotations

from pathlib import Path

from .base import HeaprSubcommand


class InspectCommand(HeaprSubcommand):
    NAME = "inspect"
    HELP = "Print a statistics file, a plan or the report of a pruned model as tables."

    @staticmethod
    def parse_args(parser):
        parser.add_argument("path", help="statistics file, plan file, report.json, or folder of a pruned model")

    def execute(self) -> None:
        from ..calibration.statistics import FORMAT as STATISTICS_FORMAT
        from ..calibration.statistics import AtomicStatistics
        from ..planning.plan import PruningPlan
        from ..report.content import build_report
        from ..report.files import read_report
        from ..utils.artefacts import artefact_format
        from ..utils.companions import PLAN_NAME, REPORT_NAME, own_file
        from .tables import importance_table, report_text, search_lines, size_line, statistics_table

        path = Path(self.args.path)
        if path.is_dir():
            report = own_file(path, REPORT_NAME)
            path = report if report.is_file() else own_file(path, PLAN_NAME)
        if path.suffix == ".json":
            print(report_text(read_report(path)))
        elif artefact_format(path) == STATISTICS_FORMAT:
            statistics = AtomicStatistics.load(path)
            print(statistics_table(statistics), importance_table(statistics), sep="\n\n")
        else:
            plan = PruningPlan.load(path)
            report = report_text(build_report(plan, plan.model["model_type"]))
            print(report, "\n".join([size_line(plan), *search_lines(plan)]), sep="\n\n")
