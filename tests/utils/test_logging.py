# Licensed under the Apache License, Version 2.0
"""Messages obey the verbosity of transformers and of optimum; bars say where they are."""

import io
import logging
import re
import sys
from types import SimpleNamespace

import optimum.utils.logging as optimum_logging
import pytest
import transformers.utils.logging as transformers_logging

from optimum_heapr.utils.logging import get_logger, progress, show_throughput, with_paths


@pytest.fixture
def levels():
    """Both at their default, and as they were afterwards."""
    before = transformers_logging.get_verbosity(), optimum_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    optimum_logging.set_verbosity_warning()
    yield
    transformers_logging.set_verbosity(before[0])
    optimum_logging.set_verbosity(before[1])


def messages(log) -> list[str]:
    logger = get_logger("optimum_heapr.somewhere")
    log.clear()
    logger.info("an %s", "information")
    logger.warning("a warning")
    logger.error("an error")
    return list(dict.fromkeys(record.getMessage() for record in log.records))  # the root may hand them over as well


@pytest.mark.parametrize("library", [transformers_logging, optimum_logging])
def test_verbosity_of_either_library(library, levels, heapr_log):
    assert messages(heapr_log) == ["a warning", "an error"]
    library.set_verbosity_error()
    assert messages(heapr_log) == ["an error"]
    library.set_verbosity_info()
    assert messages(heapr_log) == ["an information", "a warning", "an error"]
    library.set_verbosity_warning()
    assert messages(heapr_log) == ["a warning", "an error"]


def test_what_was_set_for_optimum_goes_first(levels, heapr_log):
    transformers_logging.set_verbosity_info()
    optimum_logging.set_verbosity_error()
    assert messages(heapr_log) == ["an error"]


def test_records_name_the_line_that_logged(levels, heapr_log):
    messages(heapr_log)
    record = heapr_log.records[0]
    assert record.name == "optimum.heapr.somewhere" and record.funcName == "messages"
    logging.disable(logging.CRITICAL)
    try:
        assert messages(heapr_log) == []
    finally:
        logging.disable(logging.NOTSET)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch) -> Terminal:
    for name in ("RANK", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_bar_shows_speed_and_memory(monkeypatch):
    stream = terminal(monkeypatch)
    bar = progress(range(3), desc="Calibrating", mininterval=0)
    for index in bar:
        show_throughput(bar, 1000 * (index + 1))
    assert "tokens/s" in stream.getvalue() and "GiB at most" in stream.getvalue()


def test_a_bar_over_layers_names_them(monkeypatch):
    stream = terminal(monkeypatch)
    blocks = [SimpleNamespace(path=f"model.layers.{index}.mlp.experts") for index in range(3)]
    assert list(with_paths(blocks, desc="Pruning", mininterval=0)) == blocks
    assert "model.layers.1.mlp.experts" in stream.getvalue()


def test_a_notebook_has_bars(monkeypatch):
    """Of `tqdm.auto`, which shows a widget there; a kernel's standard error is no terminal."""
    from tqdm.auto import tqdm

    stream = io.StringIO()
    for name in ("RANK", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", SimpleNamespace())
    bar = progress(range(3), desc="Calibrating", mininterval=0)
    assert type(bar) is tqdm and list(bar) == [0, 1, 2] and "Calibrating: 100%" in stream.getvalue()


def test_off_a_terminal_there_are_lines_of_what_takes_long(monkeypatch):
    for name in ("RANK", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    stream, now = io.StringIO(), [1000.0]
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(range(8), desc="Calibrating", unit="batch") as bar:
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = now[0]
        for _ in bar:
            now[0] += 20.0  # 160 seconds in all
            # Beside a bar of another library, tqdm has a thread that asks each bar for more where this holds.
            assert not bar.miniters > 1
    lines = [re.fullmatch(r"Calibrating: (.*), (\d+):(\d+) left", line) for line in stream.getvalue().splitlines()]
    assert [line[1] for line in lines] == ["25%, 2 of 8", "50%, 4 of 8", "75%, 6 of 8"]
    assert [60 * int(line[2]) + int(line[3]) for line in lines] == pytest.approx([120, 80, 40], abs=1)


def test_off_a_terminal_nothing_is_shown_of_what_is_short(monkeypatch):
    stream = io.StringIO()
    for name in ("RANK", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    bar = progress(range(3))
    for _ in bar:
        show_throughput(bar, 10)
    list(with_paths([SimpleNamespace(path="x")]))
    assert stream.getvalue() == ""
