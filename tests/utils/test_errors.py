# Licensed under the Apache License, Version 2.0
"""The error type that users see, the hint at a near name, and the names of loggers."""

import io
import logging
import sys

import pytest

from optimum_heapr.utils.errors import HeaprError, did_you_mean, reason_of
from optimum_heapr.utils.logging import get_logger, is_main_process, progress


def test_the_error_is_a_value_error_with_a_plain_message():
    assert issubclass(HeaprError, ValueError)
    assert str(HeaprError("ratio=2: must lie in (0, 1)")) == "ratio=2: must lie in (0, 1)"


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("ration", '; did you mean "ratio"?'),
        ("num_sample", '; did you mean "num_samples"?'),
        ("xyz", ""),
        (5, ""),
    ],
)
def test_the_nearest_name_is_suggested(value, hint):
    assert did_you_mean(value, iter(["ratio", "num_samples", "seq_length"])) == hint


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("document"), "it has no 'document'"),
        (ValueError("invalid literal for int() with base 10: 'x'"), "something in it must be a number, and is 'x'"),
        (
            TypeError("list indices must be integers or slices, not str"),
            "something in it is not of the kind that it must be",
        ),
        (AttributeError("'list' object has no attribute 'get'"), "something in it is not of the kind that it must be"),
        (IndexError("list index out of range"), "something in it is not of the kind that it must be"),
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid continuation byte"), "it is not UTF-8 text"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "No such file or directory: a.json"),
        (
            OSError("nobody/nothing is not a local folder\nand not on the Hub"),
            "nobody/nothing is not a local folder and not on the Hub",
        ),
        (StopIteration(), "it has no rows"),
        (ValueError(), "ValueError"),
    ],
    ids=repr,
)
def test_what_is_the_matter_is_said_in_the_terms_of_whoever_has_the_file(error, reason):
    assert reason_of(error) == reason


def test_loggers_are_below_that_of_optimum():
    assert get_logger("optimum_heapr.planning.plan").name == "optimum.heapr.planning.plan"
    assert get_logger("optimum_heapr").logger is logging.getLogger("optimum.heapr")


def test_only_rank_0_is_the_main_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert is_main_process()
    monkeypatch.setenv("RANK", "0")
    assert is_main_process()
    monkeypatch.setenv("RANK", "3")
    assert not is_main_process()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("terminal", "environment", "shown"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"RANK": "1"}, False),
        (True, {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}, False),
        (True, {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}, True),
    ],
)
def test_progress_bars_are_shown_on_the_terminal_of_the_first_rank_only(monkeypatch, terminal, environment, shown):
    for name in ("RANK", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress(range(3), desc="Calibrating")) == [0, 1, 2]
    assert ("Calibrating" in stream.getvalue()) == shown
