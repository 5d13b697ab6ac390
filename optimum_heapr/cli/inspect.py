# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr inspect`: what a statistics file, a plan or a pruned model holds."""

from __future__ import annotations

from pathlib import Path

from .base import HeaprSubcommand


class InspectCommand(HeaprSubcommand):
    NAME = "inspect"
    HELP = "Print a statistics file, a plan or a pruned model as tables."

    @staticmethod
    def parse_args(parser):
        parser.add_argument("path", help="statistics file, plan file, or folder of a pruned model")

    def execute(self) -> None:
        from ..calibration.statistics import FORMAT as STATISTICS_FORMAT
        from ..calibration.statistics import AtomicStatistics
        from ..planning.plan import PLAN_NAME, PruningPlan
        from ..utils.artefacts import artefact_format
        from .tables import plan_table, statistics_table

        path = Path(self.args.path)
        if path.is_dir():
            path = path / PLAN_NAME
        if artefact_format(path) == STATISTICS_FORMAT:
            print(statistics_table(AtomicStatistics.load(path)))
        else:
            print(plan_table(PruningPlan.load(path)))
