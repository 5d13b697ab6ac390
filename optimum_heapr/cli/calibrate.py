# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr calibrate`: model and text in, statistics file out."""

from __future__ import annotations

from typing import Any

from ..utils.errors import HeaprError
from ..utils.files import check_output_is_not_input
from .base import HeaprSubcommand
from .checks import check_texts, source_names
from .options import CALIBRATION_OPTIONS, add_config_options, add_model_options, config_from
from .running import add_memory_options, add_state_options, chosen_memory, end_processes, state_from


class CalibrateCommand(HeaprSubcommand):
    NAME = "calibrate"
    HELP = "Measure the statistics of every atomic expert; they serve for any ratio."
    KEPT = (".state",)

    @staticmethod
    def parse_args(parser):
        add_model_options(parser)
        parser.add_argument("-o", "--output", default="statistics.safetensors", help="statistics file to write")
        parser.add_argument(
            "--overwrite", action="store_true", help="replace the output if it is an artefact of this package"
        )
        add_state_options(parser)
        add_memory_options(parser)
        parser.add_argument(
            "--no-grams",
            action="store_true",
            help="leave the matrices out of the file: the removal curves of --criterion obs serve every ratio, but "
            "compensation needs the matrices",
        )
        # With criterion obs the order of removal is computed here, once for all plans.
        add_config_options(parser, (*CALIBRATION_OPTIONS, "criterion", "ridge"))

    def execute(self) -> Any:
        from ..utils.artefacts import check_output_artefact

        config = config_from(self.args)
        check_output_is_not_input(self.args.output, self.args.model, self.args.config, *source_names(config))
        if self.args.no_grams and config.criterion != "obs":
            raise HeaprError(
                f"--no-grams: with criterion={config.criterion!r} nothing would be made of the matrices; add --criterion obs, "
                "or measure none with --statistics vector"
            )
        check_output_artefact(self.args.output, self.args.overwrite)
        from ..calibration.processes import start_processes
        from ..pruner import HeaprPruner
        from ..utils.logging import is_main_process
        from .documents import statistics_document
        from .tables import statistics_table

        start_processes()  # before anything can go wrong in one of them: then the others are told
        check_texts(config, evaluates=False)
        with chosen_memory(self.args, config) as options:
            state, saving = state_from(self.args, options["memory"])
            pruner = HeaprPruner.from_pretrained(self.args.model, config, **options)
            statistics = pruner.calibrate(keep_grams=not self.args.no_grams, **saving)
            del pruner
            if is_main_process():
                statistics.save(self.args.output, grams=not self.args.no_grams)
            text, found = (statistics_table(statistics), statistics.cost), statistics_document(statistics)
            del statistics  # before the files that its matrices may be mapped from
        end_processes(state)
        if not is_main_process():
            return None
        self.show(*text)
        print(f"Statistics written to {self.args.output}")
        return {"output": self.args.output, **found}
