# Licensed under the Apache License, Version 2.0
"""What messages call things: they are written once, in the terms of Python, and name flags where a command prints them."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import shlex

from ..configuration import HeaprConfig


OTHERS = {"repo_id": "--push-to-hub", "prompts": "--prompt"}
"""Flags that are not named like their argument."""


PHRASES = {
    "with keep_grams=True": "without --no-grams",
    "option of HeaprConfig": "option of a recipe",
    "option of RecoveryConfig": "option of a recipe of recover",
    "HeaprPruner.plan()": "`optimum-cli heapr prune --dry-run`",
    "HeaprPruner.apply()": "`optimum-cli heapr apply --in-memory`",
    "HeaprPruner.frontier()": "`optimum-cli heapr frontier`",
}

_VALUE = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\[[^\]]*\]|[^\s,;:()\[\]'"]*[^\s.,;:()\[\]'"]"""
_PARTS = re.compile(
    r"^(?P<subject>[a-z_]+)(?=: )"
    rf"|(?P<phrase>{'|'.join(map(re.escape, PHRASES))})"
    rf"|(?<![\w./-])(?P<name>[a-z]+(?:_[a-z]+)*)=(?P<value>{_VALUE})"
    r"""|(?<!\w)(?:'[^']*'|"[^"]*")(?!\w)"""  # a value, in which nothing is a name
    r"|(?<![\w./=-])(?P<word>[a-z]+(?:_[a-z]+)+)(?![\w/=(-]|\.\w)"
)


def in_flags(message: str, parser: argparse.ArgumentParser) -> str:
    """A message in the terms of the command line: `layout='uniform'` is `--layout uniform`, and `num_samples` is `--num-samples`.

    What is no flag of the command, nor an option of a recipe, stays as it is but for the `=`, and so do values.

    Args:
        message (`str`): as Python raises or logs it.
        parser (`ArgumentParser`): of the command.
    """
    flags = _flags(parser)

    def replaced(part: re.Match) -> str:
        name, value = part["name"] or part["word"] or part["subject"], part["value"]
        if part["phrase"] or name not in flags:
            is_subject = part["name"] and part.start() == 0  # a file beside the output, or an argument without a flag
            return f"{name} {_shell(value)}" if is_subject else PHRASES.get(part[0], part[0])
        if value == "False":
            return flags[name].replace("--", "--no-", 1)
        return flags[name] if value in (None, "None", "[]", "True") else f"{flags[name]} {_shell(value)}"

    return _PARTS.sub(replaced, message)


def _flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The long flag of each argument: what a recipe or another command may set, and above that the command's own."""
    found = {option.name: "--" + option.name.replace("_", "-") for option in dataclasses.fields(HeaprConfig)} | OTHERS
    for action in parser._actions:
        if long := [flag for flag in action.option_strings if flag.startswith("--")]:
            found[action.dest] = long[0]
            if action.nargs == "+":  # one of several, as of --ratios
                found[action.dest.removesuffix("s")] = long[0]
    return found


def _shell(value: str) -> str:
    """A value as one writes it after a flag."""
    try:
        found = ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that it may raise
        return value
    return (
        shlex.join(map(str, found))
        if isinstance(found, list)
        else shlex.quote(found)
        if isinstance(found, str)
        else value
    )
