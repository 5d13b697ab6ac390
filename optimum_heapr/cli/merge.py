# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr merge`: statistics of one model on different data in, their sum out."""

from __future__ import annotations

from typing import Any

from ..utils.files import check_output_is_not_input
from .base import HeaprSubcommand


class MergeCommand(HeaprSubcommand):
    NAME = "merge"
    HELP = "Add the statistics of several calibrations of one model on different data."

    @staticmethod
    def parse_args(parser):
        parser.add_argument("statistics", nargs="+", help="statistics files, two or more")
        parser.add_argument("-o", "--output", required=True, help="statistics file to write")
        parser.add_argument(
            "--overwrite", action="store_true", help="replace the output if it is an artefact of this package"
        )

    def execute(self) -> Any:
        from ..utils.artefacts import check_output_artefact

        check_output_is_not_input(self.args.output, *self.args.statistics)
        check_output_artefact(self.args.output, self.args.overwrite)
        from ..calibration.merging import merge_statistics
        from ..calibration.statistics import AtomicStatistics
        from .documents import statistics_document
        from .tables import statistics_table

        merged = merge_statistics([AtomicStatistics.load(path) for path in self.args.statistics])
        merged.save(self.args.output)
        self.show(statistics_table(merged))
        print(f"Statistics written to {self.args.output}")
        return {"output": self.args.output, **statistics_document(merged)}
