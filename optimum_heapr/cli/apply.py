# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr apply`: model and plan in, pruned model out. Text is needed to compensate over blocks only."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from ..utils.errors import HeaprError
from ..utils.files import check_output_is_not_input
from .base import HeaprSubcommand
from .options import TEXT_OPTIONS, add_config_options, add_model_options, changed_options, model_options_from
from .running import check_resume, end_processes, fits_from


class ApplyCommand(HeaprSubcommand):
    NAME = "apply"
    HELP = "Cut a model as a plan says."
    KEPT = (".fits",)

    @staticmethod
    def parse_args(parser):
        add_model_options(parser)
        parser.add_argument("-p", "--plan", required=True, help="plan file of 'plan', or folder of a pruned model")
        parser.add_argument(
            "-s", "--statistics", help="statistics of 'calibrate', as for 'plan'; needed to compensate experts"
        )
        add_output_options(parser)
        title = "Calibration text, to compensate over blocks (default: what the plan names)"
        add_config_options(parser, TEXT_OPTIONS, title=title)
        parser.add_argument(
            "--in-memory",
            action="store_true",
            help="load the whole model instead of cutting its checkpoint file by file; --packed and --device-map "
            "imply it; the result is the same",
        )
        parser.add_argument(
            "--resume",
            action="store_true",
            help="keep each block that is compensated over or trained in OUTPUT.fits, and go on from those that are there",
        )

    def execute(self) -> Any:
        from ..utils.files import check_output_folder

        args = self.args
        check_output_is_not_input(args.output, args.model, args.plan, args.statistics)
        check_output_folder(args.output, args.overwrite)
        check_push(args)
        saving = save_options_from(args)
        from ..calibration.processes import start_processes
        from ..checkpoints.requantizing import check_requantizing
        from ..checkpoints.saving import apply_streaming, check_form
        from ..planning.plan import PruningPlan
        from ..pruner import HeaprPruner
        from ..utils.logging import is_main_process, say_once, without_warnings
        from .documents import plan_document
        from .tables import plan_table

        plan = PruningPlan.load(args.plan)
        changed = {name: value for name, value in changed_options(args).items() if value != getattr(plan.config, name)}
        if plan.config.compensates_blocks:
            plan.config = plan.config.replace(**changed)
        else:  # what was calibrated on is recorded, and stays so
            for name, value in changed.items():
                say_once(f"{name}={value!r}: has no use, as the plan does not compensate over blocks")
        if args.statistics is not None and not plan.config.compensates_experts:
            say_once(f"statistics={args.statistics!r}: has no use, as the plan does not compensate within experts")
        if plan.config.compensates_blocks and plan.config.dataset is None:
            measured = {"num_samples": 0, "num_tokens": 0, "source": "text that is not known", **plan.data}
            raise HeaprError(
                "dataset=None: the plan compensates over blocks, which takes text, and names none, as it was made from statistics; pass what "
                "these were measured on ({num_samples} samples, {num_tokens:,} tokens of {source}) with --dataset, --num-samples and "
                "--seq-length".format(**measured)
            )
        check_form(plan.config, args.experts_as)
        options = model_options_from(args)
        if args.requantize:
            check_requantizing(plan.config, args.model, plan, **options)
        fits = fits_from(args) if plan.config.compensates_blocks else None
        check_resume(args, False, fits)
        start_processes()  # under `accelerate launch` all fit blocks, one cuts and writes
        is_first = is_main_process()
        if is_first or plan.config.compensates_blocks:
            with nullcontext() if is_first else without_warnings():
                if args.in_memory or args.packed or args.device_map:
                    pruner = HeaprPruner.from_pretrained(args.model, plan.config, **options)
                    pruner.apply(plan, args.statistics, fits_path=fits if args.resume else None)
                    if is_first:
                        pruner.save_pretrained(args.output, args.overwrite, **saving)
                else:
                    options |= {name: saving[name] for name in ("max_shard_size", "experts_as", "requantize")}
                    apply_streaming(
                        args.model,
                        plan,
                        args.output,
                        args.overwrite,
                        statistics=args.statistics,
                        fits_path=fits if args.resume else None,
                        **options,
                    )
        end_processes()
        if not is_first:
            return None
        self.show(plan_table(plan))
        print(f"Pruned model written to {args.output}")
        return {"output": args.output, "pushed": push(args), **plan_document(plan, args.model)}


def add_output_options(parser, required: bool = True) -> None:
    """Flags of commands that write a model."""
    parser.add_argument("-o", "--output", required=required, help="folder for the pruned model")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that this package wrote")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file, e.g. 5GB")
    parser.add_argument(
        "--packed", action="store_true", help="store packed tensors, which load faster, not one an expert"
    )
    parser.add_argument(
        "--experts-as",
        default="packed",
        choices=("packed", "linear"),
        help="form in which the output loads: linear layers are what quantizers and adapters look for",
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="write in FP8 what --dequantize took from there; for experts of one width (--layout uniform --align-for fp8)",
    )

    hub = parser.add_argument_group("Hub options")
    hub.add_argument("--push-to-hub", metavar="REPO", help="upload the pruned model as well, in one commit")
    hub.add_argument("--private", action="store_true", help="make the repository private, if it is made")


def check_push(args) -> None:
    """Refuses a push that cannot work before any work is done for it.

    Raises:
        HeaprError: if nobody is logged in, the name is malformed, or `--private` is alone.
    """
    if args.push_to_hub:
        from ..hub.push import check_login

        check_login(args.push_to_hub)
    elif args.private:
        raise HeaprError("private=True: is about a repository on the Hub; name one with --push-to-hub")


def push(args) -> str | None:
    """Uploads the output, if that was asked for; returns the address of the commit then."""
    if not args.push_to_hub:
        return None
    from ..hub.push import push_folder

    commit = push_folder(args.output, args.push_to_hub, private=args.private or None)
    print(f"Pushed to the Hub: {commit}")
    return str(commit)


def save_options_from(args) -> dict:
    """The flags that say how weights are stored, as keyword arguments of `save_pretrained`.

    Raises:
        HeaprError: if the shard size is none, or flags contradict one another.
    """
    from ..utils.sizes import parse_size

    size = parse_size("max_shard_size", args.max_shard_size)
    if args.packed and args.experts_as == "linear":
        raise HeaprError("experts_as='linear': needs the tensors of one expert each; leave --packed out")
    if args.packed and args.requantize:
        raise HeaprError("requantize=True: needs the tensors of one expert each; leave --packed out")
    if args.requantize and not args.dequantize:
        raise HeaprError("requantize=True: is for what was dequantized; pass --dequantize as well, or leave it out")
    found = {"max_shard_size": size, "save_original_format": not args.packed, "experts_as": args.experts_as}
    return {**found, "requantize": args.requantize}
