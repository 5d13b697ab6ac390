# Licensed under the Apache License, Version 2.0
"""Options: a dataclass whose fields are YAML, JSON, keyword arguments and flags of the command line, from one source."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HeaprError, did_you_mean, reason_of
from .logging import say_once
from .public import public_name
from .sizes import written_number
from .summary import Summary


if TYPE_CHECKING:
    from typing import Self


_TEXTS = ("dataset", "eval_dataset")  # options that may hold a path


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of `Options`: its default, the help text of its flag, and what a text may be."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Options(Summary):
    """Base of the configurations: types and choices are checked here, ranges by the subclass in `__post_init__`."""

    # By name of an option, others of which it takes one to change anything, and of each the values that will do: () for all but
    # zero and off. No field, and so not annotated.
    NEEDS = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self._summary().items())})"

    def _summary(self) -> dict[str, str]:
        values = {part.name: (getattr(self, part.name), part.default) for part in dataclasses.fields(self)}
        return {name: repr(value) for name, (value, default) in values.items() if value != default}

    def __post_init__(self) -> None:
        for name, kind in option_types(type(self)).items():
            setattr(self, name, _checked_type(name, getattr(self, name), kind))
        for option in dataclasses.fields(self):
            choices, value = option.metadata["choices"], getattr(self, option.name)
            if choices and value not in choices:
                hint = did_you_mean(value, choices)
                raise HeaprError(f"{option.name}={value!r}: must be one of {', '.join(choices)}{hint}")

    def check_least(self, name: str, least: int) -> None:
        """Refuses a number below `least`.

        Raises:
            HeaprError: naming the number.
        """
        value = getattr(self, name)
        if value < least:
            raise HeaprError(f"{name}={value}: must be at least {least}; leave it out for the default")

    @classmethod
    def checked(cls, config: Self | None, varied: Mapping[str, Sequence[Any] | None] | None = None) -> Self:
        """The config that was passed, or the defaults. Of its options, those that have no use are named in a warning.

        Args:
            config (`Options`, *optional*): of this class.
            varied (`Mapping[str, Sequence]`, *optional*): by name of an option, the values that it will have in place of the config's.

        Raises:
            HeaprError: if it is something else, such as a mapping or the path of a recipe.
        """
        if config is not None and not isinstance(config, cls):
            name = cls.__name__
            raise HeaprError(
                f"config: is of type {type(config).__name__}; pass a {name}, such as {name}.from_file(path) or "
                f"{name}.from_dict(mapping)"
            )
        config = config or cls()
        default = {part.name: part.default for part in dataclasses.fields(config)}
        for name, needed in cls.NEEDS.items():
            value = getattr(config, name)
            others = {key: (varied or {}).get(key) or [getattr(config, key)] for key in needed}
            found = [(key, other) for key, values in others.items() for other in values]
            uses = (other in needed[key] if needed[key] else other for key, other in found)
            if value != default[name] and not any(uses):
                words = " and ".join(f"{key}={other!r}" for key, other in found)
                say_once(f"{name}={value!r}: has no use with {words}")
        return config

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Makes a config from a mapping, such as a parsed recipe.

        Raises:
            HeaprError: if a key is unknown (the message suggests the nearest one) or a value is out of its range.
        """
        if not isinstance(values, dict):
            raise HeaprError(f"config={values!r}: must be a mapping of option names to values")
        known = [option.name for option in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                hint = did_you_mean(key, known) or f"; known are {', '.join(known)}"
                raise HeaprError(f"{key!r}: unknown option of {cls.__name__}{hint}")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> Self:
        """Reads a recipe: YAML (`.yaml`, `.yml`) or JSON.

        Raises:
            HeaprError: if the file is missing, cannot be parsed, or holds a wrong option.
        """
        return cls.from_dict(read_mapping(path))

    def to_dict(self) -> dict[str, Any]:
        """All options as plain JSON types."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Self:
        """A copy with some options changed, validated anew."""
        return self.from_dict(self.changed(self.to_dict(), changes))

    def public(self) -> Self:
        """A copy that names no place on this machine: of texts that are paths only the names are left."""
        named = {name: getattr(self, name, None) for name in _TEXTS}
        return dataclasses.replace(self, **{name: public_name(text) for name, text in named.items() if text})

    @classmethod
    def changed(cls, values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        """`values` with `changes` on top, as flags are on top of a recipe; a subclass may drop what a change takes the place of."""
        return {**values, **changes}


def only_one(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Which of several options that take each other's place is given, if one is.

    Raises:
        HeaprError: if two are.
    """
    given = [name for name in names if values.get(name) is not None]
    if len(given) > 1:
        first, second = given[:2]
        raise HeaprError(f"{second}={values[second]!r}: {first}={values[first]!r} is given as well; leave one out")
    return given[0] if given else None


_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


def read_mapping(path: str | os.PathLike) -> dict[str, Any]:
    """Parses a YAML or JSON file whose top level is a mapping.

    Raises:
        HeaprError: if the file is missing or is not such a file.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HeaprError(
            f"config={str(path)!r}: cannot be read ({reason_of(error)}); name a YAML or JSON file"
        ) from error
    try:
        content = json.loads(text) if str(path).endswith(".json") else _with_numbers(yaml.safe_load(text))
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # yaml: ValueError for a date such as 2024-13-01
        raise HeaprError(f"config={str(path)!r}: cannot be parsed ({reason_of(error)})") from error
    if not isinstance(content, dict):
        raise HeaprError(f"config={str(path)!r}: must hold a mapping of option names to values, one a line")
    return content


def _with_numbers(content: Any) -> Any:
    """`content` with values such as 1e-4 as numbers, which they are in YAML 1.2 and JSON; in YAML 1.1 they are text."""
    if not isinstance(content, dict):
        return content
    return {
        name: float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
        for name, value in content.items()
    }


def option_types(config_class: type[Options]) -> dict[str, Any]:
    """The annotation of each option, by name."""
    return typing.get_type_hints(config_class)


def option_type(annotation: Any) -> type:
    """The plain type of an option: `str` for `str | None`."""
    if isinstance(annotation, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _checked_type(name: str, value: Any, annotation: Any) -> Any:
    kind = option_type(annotation)
    if value is None and kind is not annotation:
        return None
    if kind in (int, float) and isinstance(value, str):
        number = written_number(value)
        value = value if number is None else number
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise HeaprError(f"{name}={value!r}: must be of type {kind.__name__}, not {type(value).__name__}")
    if kind is float and not math.isfinite(value):
        raise HeaprError(f"{name}={value}: must be a finite number")
    return value
