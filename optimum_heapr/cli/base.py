# Licensed under the Apache License, Version 2.0
"""What all commands share: errors as one line with exit status 2, `--json`, `--quiet`, and what is said when a run is interrupted."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from optimum.commands.base import BaseOptimumCLICommand

from ..utils import logging
from ..utils.errors import HeaprError, did_you_mean
from .wording import in_flags


if TYPE_CHECKING:
    from argparse import ArgumentParser


COMMON_FLAGS = {
    ("--json",): "print one JSON document in place of tables, and messages to standard error",
    ("-q", "--quiet"): "print errors alone, and what --json asks for",
}


class HeaprSubcommand(BaseOptimumCLICommand):
    """A command of `optimum-cli heapr`: subclasses set `NAME` and `HELP`, add their flags and implement `execute`.

    What `execute` prints is for people: results by `show`, messages by `print`. What it returns is for programs.
    """

    NAME: ClassVar[str]
    HELP: ClassVar[str]
    KEPT: ClassVar[tuple[str, ...]] = ()
    """What `--resume` goes on from, by the endings of what lies beside the output; the last that is there is named where a run ends."""

    def __init__(self, *args: Any, from_defaults_factory: bool = False, **kwargs: Any):
        super().__init__(*args, from_defaults_factory=from_defaults_factory, **kwargs)
        if not from_defaults_factory:
            for flags, help in COMMON_FLAGS.items():
                self.parser.add_argument(*flags, action="store_true", help=help)
            one_line_errors(self.parser, lambda: self.parser._option_string_actions)

    def run(self) -> None:
        if not sys.stderr.isatty() or self.args.quiet:
            # The libraries read these when they are imported, later: a log gets lines, and few of them.
            names = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
            logging.bars_are_lines = not self.args.quiet and not any(name in os.environ for name in names)
            for name in names:
                os.environ.setdefault(name, "1")
        try:
            with _terminated_like_interrupted(), _messages(self.args), logging.worded(self._worded):
                found = self.execute()
            if self.args.json and found is not None:
                print(json.dumps(_valid(found), indent=2), flush=True)
        except BrokenPipeError:  # who read it has enough, as `head`: that is no error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again at its end
            sys.exit(141)  # 128 and SIGPIPE, which not all systems have
        except HeaprError as error:
            print(f"optimum-cli heapr {self.NAME}: error: {self._worded(str(error))}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as error:
            from ..utils.files import beside

            left = str(error) or "nothing half-written was left behind"
            measured = getattr(self.args, "statistics", None) is not None  # so there is no state of a calibration
            for ending in self.KEPT:
                kept = beside(getattr(self.args, "output", None) or "", ending)
                if os.path.exists(kept) and not (measured and ending == ".state"):
                    left = f"{kept} holds what was done, and --resume goes on from there"
            print(f"optimum-cli heapr {self.NAME}: interrupted; {left}", file=sys.stderr)
            sys.exit(128 + (signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT))

    def _worded(self, message: str) -> str:
        return in_flags(message, self.parser)

    def execute(self) -> Any:
        """Does what the command is for.

        Returns:
            What `--json` prints, of plain JSON types; `None` in a process that has nothing to say, as all but the first.
        """
        raise NotImplementedError

    def show(self, *parts: object, sep: str = "\n") -> None:
        """Prints results as text, unless they are asked for as JSON."""
        if parts and not self.args.json:
            print(*parts, sep=sep, flush=True)


def _valid(found: Any) -> Any:
    """The same without what JSON has no word for: numbers that are none are null."""
    if isinstance(found, dict):
        return {name: _valid(part) for name, part in found.items()}
    if isinstance(found, (list, tuple)):
        return [_valid(part) for part in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which is an interruption like Ctrl-C."""


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Until the block ends, SIGTERM unwinds the stack as Ctrl-C does, so that temporary files go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except SystemExit as error:
        if error.code == 128 + signal.SIGTERM:  # a calibration has saved where it is, and ends
            raise _Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextlib.contextmanager
def _messages(args: Any) -> Iterator[None]:
    """What is printed until the block ends goes to standard error with `--json`, and with `--quiet` nowhere but for errors."""
    if not args.quiet:
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), logging.without_warnings():
        yield


def one_line_errors(parser: ArgumentParser, known: Any) -> None:
    """Makes a parser say what is wrong in one line, with the nearest flag or command, and nothing else.

    Args:
        parser (`ArgumentParser`): of a command.
        known (`Callable`): gives the flags or commands that there are.
    """
    parse = parser.parse_known_args

    def error(message: str) -> NoReturn:
        wrong = re.search(r"(?:invalid choice: '([^']*)'|unknown flag '([^']*)')", message)
        hint = did_you_mean(wrong[1] or wrong[2], known()) if wrong else ""
        parser.exit(2, f"{parser.prog}: error: {message}{hint or '; --help says what there is'}\n")

    def parse_known_args(*args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        namespace, left = parse(*args, **kwargs)
        if left:  # the parser above would say that it knows none of them
            flags = _flags(left)
            parser.error(f"unknown flag {flags[0]!r}" if flags else f"unexpected argument {left[0]!r}")
        return namespace, left

    parser.error, parser.parse_known_args = error, parse_known_args


def _flags(arguments: Iterable[str]) -> list[str]:
    return [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
