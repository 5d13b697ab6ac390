# Licensed under the Apache License, Version 2.0
"""The error type that users see, the hint at a near name, and the names of loggers."""

import io
import logging
import sys

import pytest

from optimum_heapr.utils.errors import HeaprError, did_you_mean
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
    for name in ("RANK", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress(range(3), desc="Calibrating")) == [0, 1, 2]
    assert ("Calibrating" in stream.getvalue()) == shown
