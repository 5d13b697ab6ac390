# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr plan`: statistics in, plan out; or two plans compared. Needs neither the model nor the text."""

from __future__ import annotations

from typing import Any

from ..utils.errors import HeaprError
from ..utils.files import check_output_is_not_input
from .base import HeaprSubcommand
from .checks import check_serves
from .inspect import compared
from .options import PLANNING_OPTIONS, add_config_options, config_from


class PlanCommand(HeaprSubcommand):
    NAME = "plan"
    HELP = "Decide what to keep, from statistics alone."

    @staticmethod
    def parse_args(parser):
        parser.add_argument(
            "-s", "--statistics", help="statistics file of 'calibrate', or a folder or name on the Hub that holds one"
        )
        parser.add_argument("plans", nargs="*", metavar="PLAN", help="with --compare, two plans of one model")
        parser.add_argument(
            "--compare",
            action="store_true",
            help="make no plan, but compare two: what both keep, widths and estimates",
        )
        parser.add_argument("-o", "--output", default="plan.safetensors", help="plan file to write")
        parser.add_argument(
            "--overwrite", action="store_true", help="replace the output if it is an artefact of this package"
        )
        parser.add_argument("--dry-run", action="store_true", help="print the table of widths and write nothing")
        add_config_options(parser, (*PLANNING_OPTIONS, "seed"), hidden=("max_loss_increase",))

    def execute(self) -> Any:
        from ..utils.artefacts import check_output_artefact

        plans = self.args.plans
        if self.args.compare or plans:
            if not self.args.compare or len(plans) != 2 or self.args.statistics is not None:
                raise HeaprError(
                    f"plans={' '.join(plans)!r}: --compare takes two plans, and is alone in that; statistics are named with "
                    "-s/--statistics"
                )
            return compared(self, *plans)
        if self.args.statistics is None:
            raise HeaprError("statistics: name what to plan from with -s/--statistics, or two plans to --compare")
        config = config_from(self.args)
        check_output_is_not_input(self.args.output, self.args.statistics, self.args.config)
        if not self.args.dry_run:
            check_output_artefact(self.args.output, self.args.overwrite)
        from ..hub.statistics import load_statistics
        from ..planning.plan import PruningPlan
        from .documents import plan_document
        from .tables import plan_table

        statistics = load_statistics(self.args.statistics)
        check_serves(statistics, config)
        plan = PruningPlan.build(statistics, config)
        plan.warn_of_widths()
        self.show(plan_table(plan))
        if not self.args.dry_run:
            plan.save(self.args.output)
            print(f"Plan written to {self.args.output}")
        return {"output": None if self.args.dry_run else self.args.output, **plan_document(plan)}
