# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr calibrate`: model and text in, statistics file out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import HeaprError, did_you_mean
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


if TYPE_CHECKING:
    from ..configuration import HeaprConfig


MEMORY = ("auto", "plain", "offload")


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
        parser.add_argument(
            "--memory",
            default="auto",
            metavar="{" + ",".join(MEMORY) + "}",
            help="plain: all weights at once; offload: what does not fit stays on the host or the disk, and layers are "
            "computed twice; auto: as the estimate says (default: auto)",
        )
        parser.add_argument(
            "--no-grams",
            action="store_true",
            help="leave the matrices out of the file: the removal curves of --criterion obs serve every ratio, but "
            "compensation needs the matrices",
        )
        # With criterion obs the order of removal is computed here, once for all plans.
        add_config_options(parser, (*CALIBRATION_OPTIONS, "criterion", "ridge"))

    def execute(self) -> None:
        from ..utils.files import check_output_file

        config = config_from(self.args)
        if self.args.memory not in MEMORY:
            hint = did_you_mean(self.args.memory, MEMORY)
            raise HeaprError(f"memory={self.args.memory!r}: must be one of {', '.join(MEMORY)}{hint}")
        check_output_is_not_input(self.args.output, self.args.model, self.args.config, *source_names(config))
        if self.args.no_grams and config.criterion != "obs":
            raise HeaprError(
                f"--no-grams: with criterion={config.criterion!r} nothing would be made of the matrices; add --criterion obs, "
                "or measure none with --statistics vector"
            )
        check_output_file(self.args.output, self.args.overwrite)
        from ..calibration.processes import check_launcher
        from ..calibration.state import StateFile
        from ..pruner import HeaprPruner
        from ..utils.logging import is_main_process
        from .tables import statistics_table

        check_launcher()
        saving = {"resume": self.args.resume, "save_every": self.args.save_every}
        state = StateFile(f"{self.args.output}.state", **saving) if any(saving.values()) else None
        run = {} if state is None else {"state_path": f"{self.args.output}.state", "keep_state": True, **saving}
        options = model_options_from(self.args)
        offload = self._offloads(config, options)
        with _folder_beside(self.args.output) as folder:
            if offload:
                options = {"device_map": "auto", "offload_folder": folder, **options}
            pruner = HeaprPruner.from_pretrained(self.args.model, config, **options)
            statistics = pruner.calibrate(checkpointing=offload, **run)
            del pruner
        if is_main_process():
            statistics.save(self.args.output, grams=not self.args.no_grams)
        if state is not None:
            state.remove()
        end_processes()
        if is_main_process():
            print(statistics_table(statistics))
            print(statistics.cost)
            print(f"Statistics written to {self.args.output}")

    def _offloads(self, config: HeaprConfig, options: dict[str, Any]) -> bool:
        """Prints what the run needs, and decides whether weights are offloaded."""
        from ..calibration.memory import MemoryEstimate
        from ..loading import load_model
        from ..utils.logging import is_main_process

        if self.args.memory == "plain" or (self.args.memory == "auto" and {"device_map", "dequantize"} & set(options)):
            return False  # where the weights go is said already
        try:
            skeleton, _ = load_model(self.args.model, skeleton=True, **{**options, "device_map": None})
            estimate = MemoryEstimate.of(skeleton, config)
        except HeaprError:
            # Sizes are read from safetensors; what else can be loaded, or why it cannot be, is for the loading to say.
            return self.args.memory == "offload"
        offload = self.args.memory == "offload" or not estimate.fits
        if is_main_process():
            print(f"{'offload' if offload else 'plain'}: {estimate}", flush=True)
        return offload


@contextmanager
def _folder_beside(output: str) -> Iterator[str]:
    """A hidden folder for offloaded weights on the disk of the output, gone when the block ends; made when it is needed."""
    folder = Path(f"{Path(output).parent / ('.' + Path(output).name)}.{os.getpid()}.offload")
    try:
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
