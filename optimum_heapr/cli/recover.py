# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr recover`: pruned model and text in, adapter or merged model out, if it is better."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..utils.errors import HeaprError
from ..utils.files import check_output_is_not_input
from .base import HeaprSubcommand
from .checks import source_names
from .options import add_config_options, add_model_options, config_from, model_options_from
from .running import end_processes


if TYPE_CHECKING:
    from ..recovery.configuration import RecoveryConfig
    from ..recovery.report import RecoveryReport
    from ..recovery.state import RunFolder


class RecoverCommand(HeaprSubcommand):
    NAME = "recover"
    HELP = "Train a pruned model with LoRA, against text or the unpruned model, and keep the result if it is better."
    KEPT = (".state",)

    @staticmethod
    def parse_args(parser):
        from ..recovery.configuration import RecoveryConfig

        add_model_options(parser)
        parser.add_argument("-o", "--output", required=True, help="folder for the adapter, or the merged model")
        parser.add_argument("--overwrite", action="store_true", help="replace an output that this package wrote")
        parser.add_argument("--teacher", default=None, help="the unpruned model: folder, name on the Hub, or 'demo'")
        parser.add_argument("--merge", action="store_true", help="write a merged model in place of an adapter")
        parser.add_argument("--resume", action="store_true", help="go on from OUTPUT.state, if it is there")
        names = [option.name for option in dataclasses.fields(RecoveryConfig)]
        add_config_options(parser, names, RecoveryConfig)

    def execute(self) -> Any:
        from ..recovery.configuration import RecoveryConfig
        from ..recovery.reporting import check_reporting
        from ..recovery.state import RunFolder
        from ..utils.files import beside, check_output_folder

        args, config = self.args, config_from(self.args, RecoveryConfig)
        check_reporting(config)
        check_output_is_not_input(args.output, args.model, args.teacher, args.config, *source_names(config))
        check_output_folder(args.output, args.overwrite)
        if config.distills and args.teacher is None:
            raise HeaprError(
                f"teacher=None: distillation_weight={config.distillation_weight} needs the unpruned model; name it with "
                "--teacher"
            )
        from ..utils.logging import is_main_process
        from .tables import table

        with RunFolder(beside(args.output, ".state"), args.resume) as folder:
            report = self._recover(config, folder)
        end_processes()
        if not is_main_process():
            return None
        self.show(table(["stage", "held-out loss", "difference"], report.rows()))
        if report.improved:
            what = "Merged model" if args.merge else "Adapter"
            print(f"{what} of step {report.best_step} of {report.steps} written to {args.output}")
        else:
            print(f"Nothing improved in {report.steps} steps; nothing was written to {args.output}")
        return {"output": args.output if report.improved else None, **dataclasses.asdict(report)}

    def _recover(self, config: RecoveryConfig, folder: RunFolder) -> RecoveryReport:
        """Loads, trains and writes; returns what was measured."""
        from ..checkpoints.loading import load_model
        from ..recovery.adapter import check_pruned
        from ..recovery.data import RecoveryData
        from ..recovery.output import plan_of, save_adapter, save_merged
        from ..recovery.runner import recover
        from ..recovery.teacher import Teacher
        from ..utils.logging import is_main_process

        args, options = self.args, model_options_from(self.args)
        # Its shapes and its tokenizer are enough to begin with: the teacher may want the memory for itself.
        skeleton, tokenizer = load_model(args.model, skeleton=True, **{**options, "device_map": None})
        check_pruned(skeleton)
        data, plan, teacher = RecoveryData.load(config, tokenizer), plan_of(args.model), None
        if args.teacher is not None:
            # A revision is that of the pruned model.
            loading = {name: value for name, value in options.items() if name != "revision"}
            teacher = Teacher.prepare(args.teacher, skeleton, config, data, folder, plan, **loading)
        model, tokenizer = load_model(args.model, **options)
        recovery = recover(model, config, data, folder, teacher, plan, saved_at=args.model)
        if recovery.report.improved and is_main_process():
            if args.merge:
                save_merged(recovery, tokenizer, args.model, args.output, args.overwrite)
            else:
                save_adapter(recovery, tokenizer, args.output, args.overwrite)
        return recovery.report
