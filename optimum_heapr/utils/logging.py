# Licensed under the Apache License, Version 2.0
"""Loggers below `optimum.heapr`, and progress bars that stay quiet where nobody looks at them.

Optimum attaches its handler to the logger named `optimum`, so the names here begin with it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .memory import peak_memory


def get_logger(module: str) -> logging.LoggerAdapter:
    """The logger of a module of this package: `optimum_heapr.planning.plan` logs as `optimum.heapr.planning.plan`."""
    return _Logger(logging.getLogger("optimum.heapr" + module.removeprefix("optimum_heapr")), {})


class _Logger(logging.LoggerAdapter):
    """Logs from the level on that optimum has or, while this is the default, that transformers has.

    Either is read when something is logged, so `set_verbosity_*` of both holds from then on; `TRANSFORMERS_VERBOSITY` sets
    both.
    """

    def isEnabledFor(self, level: int) -> bool:
        own, transformers = self.logger.getEffectiveLevel(), logging.getLogger("transformers").level
        least = transformers if own == logging.WARNING and transformers else own
        return level >= least and level > self.logger.manager.disable

    def log(self, level: int, message: object, *arguments: Any, **options: Any) -> None:
        if self.isEnabledFor(level):
            if _wording is not None:
                message, arguments = _wording(str(message) % arguments if arguments else str(message)), ()
            options["stacklevel"] = options.get("stacklevel", 1) + 1
            self.logger._log(level, message, arguments, **options)


_wording: Callable[[str], str] | None = None
"""How what is logged is worded, where that is not in the terms of Python."""


@contextlib.contextmanager
def worded(wording: Callable[[str], str]) -> Iterator[None]:
    """Until the block ends, all that is logged is what `wording` makes of it."""
    global _wording
    before, _wording = _wording, wording
    try:
        yield
    finally:
        _wording = before


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Until the block ends no logger says anything but errors: for what is done again, and said then, or is not to be said."""
    manager = logging.root.manager
    before = manager.disable
    manager.disable = max(before, logging.WARNING)
    try:
        yield
    finally:
        manager.disable = before


def is_main_process() -> bool:
    """Whether this is rank 0, or the only process. Reads the environment, so it costs no import of torch."""
    return int(os.environ.get("RANK", "0")) == 0


@functools.cache
def say_once(line: str) -> None:
    """Warns of something that a run may come across many times, once, and on rank 0 alone."""
    if is_main_process():
        get_logger(__name__).warning("%s", line)


def say_nothing_to_resume(what: str, path: os.PathLike | str) -> None:
    """Warns, on rank 0 alone, that what `resume=True` is about is not there.

    Args:
        what (`str`): what is kept there, as errors call it.
        path (`str`): the place.
    """
    if is_main_process():
        get_logger(__name__).warning(
            "%s=%r: resume=True finds nothing there to go on from; it begins anew", what, os.fspath(path)
        )


LINE_EVERY = 30.0
"""Seconds between two lines about the progress, where that goes to no terminal."""


def progress(iterable: Iterable | None = None, **kwargs: Any):
    """A `tqdm` bar: one for each phase of the pipeline, and a widget in notebooks. Elsewhere, such as in a log, a line every
    `LINE_EVERY` seconds.

    It is silent on every rank but the first, for what takes less than that, and when `HF_HUB_DISABLE_PROGRESS_BARS` or
    `TQDM_DISABLE` is set.
    """
    from tqdm.auto import tqdm

    names = () if bars_are_lines else ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
    off = any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in names)
    if sys.stderr.isatty() or "ipykernel.zmqshell" in sys.modules:  # a notebook, as tqdm finds it; it is no terminal
        return tqdm(iterable, disable=off or not is_main_process(), **kwargs)
    # The time is looked at after each step: so a line is never late, and the thread that looks after the bars of others stays away.
    lines = {"mininterval": LINE_EVERY, "miniters": 1}
    return _lines()(iterable, disable=off or not is_main_process(), **{**lines, **kwargs})


bars_are_lines = False
"""Whether the command line has switched off the bars of libraries, which is not the wish of the user."""


@functools.cache
def _lines() -> type:
    from tqdm import tqdm

    class Lines(tqdm):
        """A bar that is a line from time to time: what is done, and how long the rest will take."""

        monitor_interval = 0  # no thread that shows a bar which does not move

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            state = self.format_dict
            if state["elapsed"] < self.mininterval or self.n == self.total:
                return
            speed = state["rate"] or (self.n - self.initial) / state["elapsed"]
            left = self.format_interval((self.total - self.n) / speed) if self.total and speed else "?"
            share = f"{self.n / self.total:.0%}, " if self.total else ""
            done = f"{self.n:,}" + (f" of {self.total:,}" if self.total else "")
            print(
                f"{self.desc or 'Progress'}: {share}{done}, {left} left {self.postfix or ''}".rstrip(), file=sys.stderr
            )

        def close(self) -> None:
            self.disable = True

    return Lines


def show_throughput(bar: Any, tokens: int) -> None:
    """Tokens a second since the bar began, and the most memory in use, behind it; nothing where it is not shown."""
    if not bar.disable:
        speed, memory = tokens / max(bar.format_dict["elapsed"], 1e-9), peak_memory() / 2**30
        bar.set_postfix_str(f"{speed:,.0f} tokens/s, {memory:.1f} GiB at most", refresh=False)


def with_paths(blocks: Iterable[Any], **kwargs: Any):
    """A bar over expert blocks that names the layer it is at."""
    with progress(blocks, **kwargs) as bar:
        for block in bar:
            if not bar.disable:
                bar.set_postfix_str(block.path, refresh=False)
            yield block
