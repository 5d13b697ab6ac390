# Licensed under the Apache License, Version 2.0
"""Flags made from `HeaprConfig` and the other configurations, and flags that say how a model is loaded."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..configuration import HeaprConfig
from ..utils.errors import HeaprError, did_you_mean
from ..utils.options import Options, option_type, option_types, read_mapping
from ..utils.sizes import written_number


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


RECOMMENDED = "--criterion obs --compensate --compensation-scope block"
"""What loses least in `docs/source/benchmarks.md`, as it is written everywhere."""


LOADING_OPTIONS = ("dtype", "device_map", "revision", "trust_remote_code", "dequantize")


DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_config_options(
    parser: argparse.ArgumentParser,
    names: Iterable[str],
    config_class: type[Options] = HeaprConfig,
    title: str | None = None,
    hidden: Iterable[str] = (),
) -> None:
    """Adds one flag for each named option of a configuration, and `-c/--config` for a recipe file that they override; `hidden` are
    those that are known, for what is said of them, and not listed."""
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
        default = "" if option.default is None else f" (default: {option.default})"
        help = argparse.SUPPRESS if name in hidden else option.metadata["help"] + default
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        else:
            choices = option.metadata["choices"]
            group.add_argument(
                flag,
                # Values are checked by the configuration, whose messages say more than argparse's; so only numbers are parsed.
                type={int: number, float: number}.get(kind, str),
                metavar="{" + ",".join(choices) + "}" if choices else kind.__name__.upper(),
                default=argparse.SUPPRESS,
                help=help,
            )


def config_from(
    args: argparse.Namespace,
    config_class: type[Options] = HeaprConfig,
    varied: Mapping[str, Sequence[Any] | None] | None = None,
) -> Any:
    """The recipe file, if any, with the flags that were given on top; `varied` as for [`Options.checked`].

    Raises:
        HeaprError: if the file cannot be read or an option is wrong.
    """
    values: dict[str, Any] = read_mapping(args.config) if args.config else {}
    given = {name: getattr(args, name) for name in args.config_options if hasattr(args, name)}
    return config_class.checked(config_class.from_dict(config_class.changed(values, given)), varied)


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
    add_loading_options(parser)


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `from_pretrained` needs besides a name."""
    loading = parser.add_argument_group("Loading options")
    loading.add_argument("--dtype", default="auto", help=f"weights' dtype: {', '.join(DTYPES)}")
    loading.add_argument("--device-map", default=None, help="where the weights go, e.g. auto")
    loading.add_argument("--revision", default=None, help="branch, tag or commit on the Hub")
    loading.add_argument(
        "--trust-remote-code", action="store_true", help="run modeling code that comes with the model"
    )
    loading.add_argument(
        "--dequantize",
        action="store_true",
        help="turn the weights of an FP8, MXFP4 or compressed-tensors checkpoint into floating point",
    )


def model_options_from(args: argparse.Namespace) -> dict[str, Any]:
    """The loading flags that were given, as keyword arguments of `from_pretrained`.

    Raises:
        HeaprError: if there is no such dtype.
    """
    check_dtype(args.dtype)
    return given(args, *LOADING_OPTIONS)


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What was given of flags that stand for nothing otherwise."""
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def flags_of(values: dict[str, Any]) -> list[str]:
    """Flags as they are written on a command line, booleans by their name alone."""
    words: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def config_flags(config: HeaprConfig) -> list[str]:
    """The flags of `prune` that make a config of the default one."""
    default, values = HeaprConfig().to_dict(), config.to_dict()
    del values["statistics"]  # names a file there
    return flags_of({name: value for name, value in values.items() if value != default[name]})


def check_dtype(dtype: str) -> None:
    """Refuses a dtype that weights are not loaded in.

    Raises:
        HeaprError: naming those that they are.
    """
    if dtype not in DTYPES:
        raise HeaprError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")


def number(text: str) -> int | float:
    """A flag's value as a number, the way argparse wants it: plain, or as `25%`, `8M`, `18k`."""
    for read in (int, float, written_number):
        try:
            value = read(text)
        except ValueError:
            continue
        if value is not None:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number; write 0.25, 25%, 8000000 or 8M")
