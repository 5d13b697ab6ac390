# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr calibrate`: model and text in, statistics file out."""

from __future__ import annotations

from .base import (
    CALIBRATION_OPTIONS,
    HeaprSubcommand,
    add_config_options,
    add_model_options,
    check_output_is_not_input,
    config_from,
    end_processes,
    model_options_from,
    source_names,
)


class CalibrateCommand(HeaprSubcommand):
    NAME = "calibrate"
    HELP = "Measure the statistics of every atomic expert; they serve for any ratio."

    @staticmethod
    def parse_args(parser):
        add_model_options(parser)
        parser.add_argument("-o", "--output", default="statistics.safetensors", help="statistics file to write")
        parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
        parser.add_argument(
            "--save-every", type=int, default=0, metavar="K", help="save the run to OUTPUT.state every K micro-batches"
        )
        parser.add_argument(
            "--resume", action="store_true", help="go on from OUTPUT.state, if it is there; also saved on Ctrl-C"
        )
        add_config_options(parser, CALIBRATION_OPTIONS)

    def execute(self) -> None:
        from ..utils.files import check_output_file

        config = config_from(self.args)
        check_output_is_not_input(self.args.output, self.args.model, self.args.config, *source_names(config))
        check_output_file(self.args.output, self.args.overwrite)
        from ..calibration.state import StateFile
        from ..pruner import HeaprPruner
        from ..utils.logging import is_main_process
        from .tables import statistics_table

        saving = {"resume": self.args.resume, "save_every": self.args.save_every}
        state = StateFile(f"{self.args.output}.state", **saving) if any(saving.values()) else None
        pruner = HeaprPruner.from_pretrained(self.args.model, config, **model_options_from(self.args))
        if state is None:
            statistics = pruner.calibrate()
        else:
            statistics = pruner.calibrate(state_path=f"{self.args.output}.state", keep_state=True, **saving)
        if is_main_process():
            statistics.save(self.args.output)
        if state is not None:
            state.remove()
        end_processes()
        if is_main_process():
            print(statistics_table(statistics))
            print(f"Statistics written to {self.args.output}")
