# Licensed under the Apache License, Version 2.0
"""What all commands share: flags made from `HeaprConfig`, model flags, and errors as one line with exit status 2."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from optimum.commands.base import BaseOptimumCLICommand

from ..configuration import MEMORY, HeaprConfig
from ..utils.errors import HeaprError, did_you_mean
from ..utils.options import Options, option_type, option_types, read_mapping


if TYPE_CHECKING:
    from ..calibration.layer_state import StateFolder
    from ..calibration.state import StateFile


CALIBRATION_OPTIONS = (
    "statistics",
    "dataset",
    "dataset_config",
    "split",
    "text_column",
    "packing",
    "dataset_streaming",
    "num_samples",
    "seq_length",
    "batch_size",
    "skip_nonfinite",
    "seed",
)
TEXT_OPTIONS = tuple(name for name in CALIBRATION_OPTIONS if name not in ("statistics", "skip_nonfinite"))
EVALUATION_OPTIONS = ("eval_samples", "eval_dataset")
PLANNING_OPTIONS = tuple(
    option.name
    for option in dataclasses.fields(HeaprConfig)
    if option.name not in (*CALIBRATION_OPTIONS, *EVALUATION_OPTIONS)
)
DTYPES = ("auto", "float32", "bfloat16", "float16")


class HeaprSubcommand(BaseOptimumCLICommand):
    """A command of `optimum-cli heapr`: subclasses set `NAME` and `HELP`, add their flags and implement `execute`."""

    NAME: ClassVar[str]
    HELP: ClassVar[str]

    def run(self) -> None:
        if not sys.stderr.isatty():
            # The libraries read these when they are imported, later: a log gets lines, an error is the only one.
            for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
                os.environ.setdefault(variable, "1")
        try:
            self.execute()
        except HeaprError as error:
            print(f"optimum-cli heapr {self.NAME}: error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            state = f"{getattr(self.args, 'output', None)}.state"
            left = "nothing half-written was left behind"
            if hasattr(self.args, "resume") and os.path.exists(state):
                left = f"{state} holds what was done, and --resume goes on from there"
            print(f"optimum-cli heapr {self.NAME}: interrupted; {left}", file=sys.stderr)
            sys.exit(130)

    def execute(self) -> None:
        raise NotImplementedError


def add_config_options(
    parser: argparse.ArgumentParser,
    names: Iterable[str],
    config_class: type[Options] = HeaprConfig,
    title: str | None = None,
) -> None:
    """Adds one flag for each named option of a configuration, and `-c/--config` for a recipe file that they override."""
    title = title or ("Pruning options" if config_class is HeaprConfig else "Recovery options")
    group = parser.add_argument_group(title)
    group.add_argument("-c", "--config", help="recipe: a YAML or JSON file of these options; flags override it")
    # A command may have a flag of its own that is named like an option.
    parser.set_defaults(config_options=tuple(names))
    kinds = option_types(config_class)
    options = {option.name: option for option in dataclasses.fields(config_class)}
    for name in names:
        option, kind = options[name], option_type(kinds[name])
        flag = "--" + name.replace("_", "-")
        help = f"{option.metadata['help']} (default: {option.default})"
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        else:
            choices = option.metadata["choices"]
            group.add_argument(
                flag,
                # Values are checked by the configuration, whose messages say more than argparse's; so only numbers are parsed.
                type={int: _number, float: _number}.get(kind, str),
                metavar="{" + ",".join(choices) + "}" if choices else kind.__name__.upper(),
                default=argparse.SUPPRESS,
                help=help,
            )


def config_from(args: argparse.Namespace, config_class: type[Options] = HeaprConfig) -> Any:
    """The recipe file, if any, with the flags that were given on top.

    Raises:
        HeaprError: if the file cannot be read or an option is wrong.
    """
    values: dict[str, Any] = read_mapping(args.config) if args.config else {}
    given = {name: getattr(args, name) for name in args.config_options if hasattr(args, name)}
    return config_class.from_dict(config_class.changed(values, given))


def changed_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of the options that a command takes, those that a flag or the recipe file gives a value.

    Raises:
        HeaprError: if the file cannot be read or an option in it is wrong.
    """
    values: dict[str, Any] = read_mapping(args.config) if args.config else {}
    HeaprConfig.from_dict(values)
    values |= {name: getattr(args, name) for name in args.config_options if hasattr(args, name)}
    return {name: value for name, value in values.items() if name in args.config_options}


def add_model_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds `-m/--model` and what `from_pretrained` needs."""
    required = parser.add_argument_group("Required arguments")
    required.add_argument(
        "-m",
        "--model",
        required=True,
        nargs="+" if several else None,
        help="folder, name on the Hub, or 'demo' for the embedded model"
        + ("; several are compared" if several else ""),
    )
    loading = parser.add_argument_group("Loading options")
    loading.add_argument("--dtype", default="auto", help=f"weights' dtype: {', '.join(DTYPES)}")
    loading.add_argument("--device-map", default=None, help="where the weights go, e.g. auto")
    loading.add_argument("--revision", default=None, help="branch, tag or commit on the Hub")
    loading.add_argument(
        "--trust-remote-code", action="store_true", help="run modeling code that comes with the model"
    )
    loading.add_argument(
        "--dequantize", action="store_true", help="turn the weights of an FP8 or MXFP4 checkpoint into floating point"
    )


def model_options_from(args: argparse.Namespace) -> dict[str, Any]:
    """The loading flags that were given, as keyword arguments of `from_pretrained`.

    Raises:
        HeaprError: if there is no such dtype.
    """
    if args.dtype not in DTYPES:
        hint = did_you_mean(args.dtype, DTYPES)
        raise HeaprError(f"dtype={args.dtype!r}: must be one of {', '.join(DTYPES)}{hint}")
    names = ("dtype", "device_map", "revision", "trust_remote_code", "dequantize")
    given = {name: getattr(args, name) for name in names}
    return {name: value for name, value in given.items() if value}


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--memory` and `--activation-memory`, for commands that calibrate."""
    parser.add_argument(
        "--memory",
        default="auto",
        metavar="{" + ",".join(MEMORY) + "}",
        help="plain: all weights at once; streaming: one layer at a time, each read twice in all; offload: what does not "
        "fit stays on the host or the disk, and layers are computed twice; auto: as the estimate says (default: auto)",
    )
    parser.add_argument(
        "--activation-memory",
        metavar="SIZE",
        help="for streaming: host memory for the inputs of all layers, e.g. 8GB; more goes to the disk of the output "
        "(default: a quarter of what is free)",
    )


def add_state_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--save-every` and `--resume`, for commands that calibrate."""
    parser.add_argument(
        "--save-every",
        type=int,
        default=0,
        metavar="K",
        help="save the calibration to OUTPUT.state every K micro-batches",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from OUTPUT.state, if it is there; also saved on Ctrl-C"
    )


def state_from(args: argparse.Namespace, memory: str) -> tuple[StateFile | StateFolder | None, dict[str, Any]]:
    """Where a calibration is saved, if that was asked for, and the options of [`HeaprPruner.calibrate`] that say so.

    The command removes it once its output is safe.

    Raises:
        HeaprError: if there is one and `--resume` was not passed, it is of another mode of `--memory`, or the command has no
            output.
    """
    from ..calibration.layer_state import StateFolder
    from ..calibration.state import StateFile

    if not (args.resume or args.save_every):
        return None, {}
    if args.output is None:
        raise HeaprError("output=None: --save-every and --resume use OUTPUT.state; name the output with -o")
    path, saving = f"{args.output}.state", {"resume": args.resume, "save_every": args.save_every}
    state = (StateFolder if memory == "streaming" else StateFile)(path, **saving)
    return state, {"state_path": path, "keep_state": True, **saving}


@contextmanager
def chosen_memory(args: argparse.Namespace, config: HeaprConfig) -> Iterator[dict[str, Any]]:
    """Prints what calibrating needs, and yields how to load the model, as keyword arguments of `from_pretrained`.

    What does not fit goes into a hidden folder on the disk of the output, which is gone when the block ends.

    Raises:
        HeaprError: if there is no such mode, size or dtype.
    """
    from ..checkpoints.loading import choose_memory
    from ..utils.logging import is_main_process
    from ..utils.sizes import parse_size

    options = model_options_from(args)
    budget = parse_size("activation_memory", args.activation_memory) if args.activation_memory else None
    memory, estimate = choose_memory(args.model, config, args.memory, budget, **options)
    if estimate is not None and is_main_process():
        print(estimate, flush=True)
    output = Path(args.output or "pruned")
    folder = Path(f"{output.parent / ('.' + output.name)}.{os.getpid()}.offload")
    try:
        placed = {} if memory == "plain" else {"offload_folder": str(folder)}
        yield {"memory": memory, "activation_memory": budget, **placed, **options}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def end_processes() -> None:
    """Closes what connects the processes of one run, if there are several; from here on each is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def source_names(config: Options) -> list[str]:
    """The paths and names in `config.dataset`, which may be a mixture.

    Raises:
        HeaprError: if the mixture cannot be read.
    """
    from ..text.sources import parse_sources

    return [source.name for source in parse_sources(config.dataset)] if config.dataset else []


def check_texts(config: HeaprConfig, calibrates: bool = True, evaluates: bool = True) -> None:
    """Opens the texts of a run, so that one that cannot be used is refused before a model is loaded for it.

    Raises:
        HeaprError: if one is missing or empty, or has no column to read.
    """
    from ..evaluation.perplexity import open_evaluation_text
    from ..text.protocols import PROTOCOLS
    from ..text.samples import check_calibration_text

    if calibrates:
        check_calibration_text(config)
    if evaluates and config.eval_samples and config.eval_dataset not in (None, *PROTOCOLS):
        open_evaluation_text(config.eval_dataset)


def check_output_is_not_input(output: str, *inputs: str | None) -> None:
    """Refuses an output whose replacement would take an input away.

    Args:
        output (`str`): file or folder to be written.
        inputs (`str`, *optional*): what the command reads: paths, or names on the Hub.

    Raises:
        HeaprError: if an input is the output, or a file or folder inside it.
    """
    place = Path(output).resolve()
    for name in filter(None, inputs):
        source = Path(name).resolve()
        if place == source or (source.exists() and place in source.parents):
            what = "is" if place == source else "holds"
            raise HeaprError(f"output={output!r}: {what} the input {name!r}; name another place")


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
