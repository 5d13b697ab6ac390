# Licensed under the Apache License, Version 2.0
"""The table of mistakes: each is a function that makes a command line, and what its one line on stderr must name.

To add one, write `@mistake` over a function of the inputs that all share and an empty folder to work in, in the file of its
subject. It returns the arguments of `optimum-cli heapr` and parts of the message: the value, what is allowed, the next step.
`test_mistakes.py` holds it to one line, status 2, and nothing written or lost. `@mistake(early=True)` also holds it to be found
before a model is loaded.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.cli.conftest import Inputs
from tests.helpers import tiny_model, tiny_tokenizer


Mistake = Callable[[Inputs, Path], tuple[list, list[str]]]

MISTAKES: dict[str, Mistake] = {}
EARLY: list[str] = []
"""Names of those that are found before the work."""


def mistake(function: Mistake | None = None, *, early: bool = False, name: str | None = None):
    """Adds a function to the table, under its own name if no other is given."""

    def add(function: Mistake) -> Mistake:
        key = name or function.__name__
        assert key not in MISTAKES, f"{key}: there is one of this name"
        MISTAKES[key] = function
        if early:
            EARLY.append(key)
        return function

    return add if function is None else add(function)


# What command lines are made of


def lines(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def saved(path, model_type: str, **changes):
    tiny_model(model_type, **changes).save_pretrained(path)
    tiny_tokenizer(path)
    return path


def copied_model(inputs, path, remove: str = ""):
    return shutil.copytree(inputs.model, path, ignore=shutil.ignore_patterns(remove) if remove else None)


def truncated(source, path):
    content = source.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def foreign(path):
    save_file({"weight": torch.zeros(3)}, path)
    return path


def prune(inputs, here, *flags, model=None, output=None):
    return ["prune", "-m", model or inputs.model, "-o", output or here / "out", *flags]


# What a command answers


def without_estimate(output: str) -> str:
    """What is printed besides the memory that a calibration needs, which is said before anything loads."""
    return re.sub(r"^memory (plain|streaming): needs .*\n", "", output, flags=re.MULTILINE)


def check(result, command: str, named: list[str], late: bool = False):
    assert result.status == 2, result
    assert result.error.startswith(f"optimum-cli heapr {command}: error: ") and result.error.count("\n") == 1
    assert result.error.endswith("\n") and (late or without_estimate(result.output) == "")
    # On the command line arguments of Python are flags; a column of a text is neither.
    assert not re.search(r"(?<!--)\b(?!input_ids=)[a-z_]+=['\[TFN\d]|\w\(\)", result.error), result.error
    for part in named:
        assert part in result.error, (part, result.error)
