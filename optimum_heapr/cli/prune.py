# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr prune`: calibrate, plan and apply in one go."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from ..utils.errors import HeaprError
from ..utils.files import check_output_is_not_input
from .apply import add_output_options, check_push, push, save_options_from
from .base import HeaprSubcommand
from .checks import check_texts, source_names
from .options import (
    CALIBRATION_OPTIONS,
    EVALUATION_OPTIONS,
    PLANNING_OPTIONS,
    RECOMMENDED,
    add_config_options,
    add_model_options,
    config_from,
    model_options_from,
)
from .running import (
    add_memory_options,
    add_state_options,
    check_resume,
    chosen_memory,
    end_processes,
    fits_from,
    kept_path,
    kept_statistics,
    state_from,
)


class PruneCommand(HeaprSubcommand):
    NAME = "prune"
    HELP = f"Calibrate, plan and cut a model in one go. What loses least is {RECOMMENDED}."
    KEPT = (".fits", ".state")

    @staticmethod
    def parse_args(parser):
        add_model_options(parser)
        add_output_options(parser, required=False)
        add_state_options(parser, "; with either flag, blocks that are fitted are kept in OUTPUT.fits as well")
        add_memory_options(parser)
        parser.add_argument(
            "-s", "--statistics", help="statistics file, folder or name on the Hub, in place of calibrating"
        )
        parser.add_argument(
            "--prompt",
            nargs="+",
            metavar="TEXT",
            help="texts that the model completes before and after, for the report (default: beginnings of the text that "
            "it is measured on)",
        )
        parser.add_argument(
            "--save-statistics",
            metavar="FILE",
            help="write the statistics there as soon as they are measured, also in a dry run, with what compensation needs; "
            "-s FILE goes on from them",
        )
        parser.add_argument("--dry-run", action="store_true", help="print the table of widths and write no model")
        parser.add_argument(
            "--strict",
            action="store_true",
            help="write nothing and exit with status 2 if the loss rises far beyond the estimate, or is not measured",
        )
        # What to measure follows from the rest; --statistics names a file here.
        measuring = [name for name in CALIBRATION_OPTIONS if name != "statistics"]
        add_config_options(parser, (*PLANNING_OPTIONS, *measuring, *EVALUATION_OPTIONS))

    def execute(self) -> Any:
        from ..utils.artefacts import check_output_artefact
        from ..utils.files import check_output_folder

        config = config_from(self.args)
        if not self.args.dry_run:
            if self.args.output is None:
                raise HeaprError("output=None: name a folder for the pruned model with -o, or pass --dry-run")
            check_output_is_not_input(
                self.args.output, self.args.model, self.args.statistics, self.args.config, *source_names(config)
            )
            check_output_folder(self.args.output, self.args.overwrite)
            check_push(self.args)
        if self.args.strict and (self.args.dry_run or config.eval_samples == 0):
            reason = "a dry run" if self.args.dry_run else "eval_samples=0"
            raise HeaprError(
                f"strict=True: looks at what is measured, and {reason} measures nothing; leave out one of them"
            )
        if self.args.save_statistics:
            check_output_is_not_input(
                self.args.save_statistics, self.args.statistics, self.args.config, *source_names(config)
            )
            check_output_artefact(self.args.save_statistics, self.args.overwrite)
        # A state that is saved holds what is measured as well.
        saved = self.args.statistics or self.args.save_statistics or self.args.save_every or self.args.resume
        kept = None if self.args.dry_run or saved else kept_path(self.args.output)
        storing = save_options_from(self.args)
        from ..calibration.processes import start_processes
        from ..checkpoints.requantizing import check_requantizing
        from ..checkpoints.saving import check_form
        from ..pruner import HeaprPruner
        from ..report.jump import refuse_jump
        from ..report.observation import check_prompts, needs_text
        from ..utils.logging import is_main_process, without_warnings
        from .documents import plan_document
        from .lines import compensation_lines, measured_lines
        from .tables import plan_table

        check_form(config, self.args.experts_as)
        if self.args.requantize:
            check_requantizing(config, self.args.model, **model_options_from(self.args))
        start_processes()  # before anything can go wrong in one of them: then the others are told
        searches = config.max_loss_increase is not None and config.eval_dataset is None
        calibrates = self.args.statistics is None or config.compensates_blocks or searches
        reads = calibrates or needs_text(config, measures=not self.args.dry_run)
        # Without a dataset there may be statistics beside the model.
        check_texts(config, reads and config.dataset is not None, evaluates=not self.args.dry_run)
        if self.args.statistics is not None and self.args.memory == "auto":
            self.args.memory = "plain"  # nothing is calibrated
        fits = fits_from(self.args) if config.compensates_blocks and not self.args.dry_run else None
        with chosen_memory(self.args, config) as options:
            way = f"--tp-plan {self.args.tp_plan}" if self.args.tp_plan else f"--memory {options['memory']}"
            otherwise = "leave --tp-plan out" if self.args.tp_plan else "pass --memory plain"
            if self.args.packed and way != "--memory plain":
                raise HeaprError(
                    f"packed=True: needs the model in memory, and this one is calibrated with {way}; leave --packed out, or {otherwise}"
                )
            if self.args.strict and way != "--memory plain":
                raise HeaprError(
                    f"strict=True: looks at what is measured with the model in memory of one process, and this is {way}; leave "
                    f"--strict out and use 'evaluate', or {otherwise}"
                )
            # Without a dataset there are statistics beside the model, or nothing to calibrate on.
            will_measure = self.args.statistics is None and config.dataset is not None
            state, saving = state_from(self.args, options["memory"], will_measure)
            pruner = HeaprPruner.from_pretrained(self.args.model, config, self.args.statistics, **options)
            pruner.check()
            if self.args.requantize and pruner.statistics is None:  # else the plan says at once
                check_requantizing(config, self.args.model, model=pruner.model, **model_options_from(self.args))
            check_prompts(self.args.prompt, pruner.tokenizer)
            measures = pruner.statistics is None
            check_resume(self.args, measures, fits)
            if measures and self.args.dry_run and not self.args.save_statistics and is_main_process():
                left = "keeps no statistics; --save-statistics FILE does"
                if state is not None:
                    left = f"leaves what it measures in {state.path}, and --resume goes on from there"
                print(f"A dry run {left}", flush=True)
            if measures:
                pruner.calibrate(keep_grams=config.compensates_experts, **saving)
            if self.args.save_statistics and is_main_process():
                pruner.statistics.save(self.args.save_statistics)
                print(f"Statistics written to {self.args.save_statistics}", flush=True)
            # Under `accelerate launch` all processes calibrate and fit blocks, and one measures, cuts and writes.
            done = None if self.args.dry_run else state  # a dry run leaves all states to a run that cuts
            shares = config.compensates_blocks and config.max_loss_increase is None
            if not shares and done is None:
                end_processes()
            if not is_main_process():
                if shares:
                    with without_warnings():  # the first says all of it
                        plan = pruner.plan()
                        if not self.args.dry_run:
                            pruner.apply(plan)
                del pruner
                if shares or done is not None:
                    end_processes(done)
                return None
            if pruner.statistics.cost is not None:
                self.show(pruner.statistics.cost)
            keeps = kept is not None and measures
            with kept_statistics(pruner.statistics, kept, config.compensates_experts) if keeps else nullcontext():
                plan = pruner.plan()
                self.show(plan_table(plan))
                if self.args.dry_run:
                    del pruner
                    if shares:
                        end_processes()
                    return {"output": None, **plan_document(plan, self.args.model)}
                if self.args.requantize:
                    check_requantizing(plan.config, self.args.model, plan, **model_options_from(self.args))
                keeps_fits = self.args.save_every or self.args.resume
                pruner.apply(plan, measure=True, prompts=self.args.prompt, fits_path=fits if keeps_fits else None)
                if shares and done is None:
                    end_processes()
                if self.args.strict:
                    refuse_jump(pruner.report)
                pruner.save_pretrained(self.args.output, self.args.overwrite, **storing)
            report = pruner.report
            del pruner  # before the files that the matrices of its statistics may be mapped from
        if state is not None:
            end_processes(state)
        self.show(*compensation_lines(plan), *measured_lines(report, plan.config.eval_samples > 0))
        print(f"Pruned model written to {self.args.output}, with heapr/report.html")
        found = {**plan_document(plan, self.args.model), **(report or {})}
        return {"output": self.args.output, "pushed": push(self.args), **found}
