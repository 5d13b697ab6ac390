# Licensed under the Apache License, Version 2.0
"""What lets a calibration be killed at any moment and go on later: its sums so far, and how far it came."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.artefacts import read_artefact, write_artefact
from ..utils.errors import HeaprError, reason_of
from ..utils.logging import get_logger


if TYPE_CHECKING:
    from .tap import BlockAccumulator


FORMAT = "heapr_calibration_state"

logger = get_logger(__name__)


@dataclass
class Progress:
    """How far one process came.

    Attributes:
        batches (`int`): micro-batches of this process that are done.
        loss (`float`): sum of the losses in nats.
        targets (`int`): tokens that were predicted.
        skipped (`list[int]`): samples that are in no statistic, because something was not finite.
    """

    batches: int = 0
    loss: float = 0.0
    targets: int = 0
    skipped: list[int] = field(default_factory=list)


class StateFile:
    """The file that a calibration is resumed from. With several processes each has its own, `path.1`, `path.2`, ….

    Args:
        path (`str`): the file.
        resume (`bool`): go on from the file, if there is one.
        save_every (`int`): micro-batches between two savings; with 0 it is saved at the end and when SIGTERM or Ctrl-C
            arrives.

    Raises:
        HeaprError: if the file exists and `resume` is off, or `save_every` is negative.
    """

    def __init__(self, path: str | os.PathLike, resume: bool = False, save_every: int = 0):
        check_save_every(save_every)
        self.path = state_path(path)
        self.save_every = save_every
        self.run: dict[str, Any] = {}
        if self.path.is_dir():
            raise HeaprError(
                f"state={str(self.path)!r}: was saved by a calibration that is streaming; go on with memory='streaming', or "
                "delete the folder to begin anew"
            )
        if self.path.exists() and not resume:
            raise HeaprError(
                f"state={str(self.path)!r}: a calibration was interrupted here; pass resume=True to go on, or "
                "delete the file to begin anew"
            )

    def begin(self, run: dict[str, Any], sums: dict[str, BlockAccumulator]) -> Progress:
        """Fills `sums` with what was saved, if anything was.

        Args:
            run (`dict`): what the sums depend on: model, data, options; plain JSON types.
            sums (`dict[str, BlockAccumulator]`): by block path, all zero.

        Raises:
            HeaprError: if the file is damaged, or was written by a run that differs; the message names what does.
        """
        self.run = json.loads(json.dumps(run))
        if not self.path.exists():
            return Progress()
        tensors, document = read_artefact(self.path, FORMAT)
        found = differences(document["run"], self.run)
        if found:
            raise HeaprError(
                f"state={str(self.path)!r}: saved by a run that differs ({'; '.join(found)}); resume with the same "
                "model, data and options, or delete the file to begin anew"
            )
        try:
            for path, accumulator in sums.items():
                for name, tensor in accumulator.sums().items():
                    tensor.copy_(tensors[f"{path}.{name}"])
            progress = Progress(**document["progress"])
        except (KeyError, RuntimeError, TypeError) as error:
            raise HeaprError(
                f"state={str(self.path)!r}: is damaged ({reason_of(error)}); delete the file to begin anew"
            ) from error
        logger.warning("Going on after %d micro-batches, from %s", progress.batches, self.path)
        return progress

    def is_due(self, progress: Progress) -> bool:
        """Whether to save after this micro-batch."""
        return self.save_every > 0 and progress.batches % self.save_every == 0

    def save(self, progress: Progress, sums: dict[str, BlockAccumulator]) -> None:
        """Writes the file, whole or not at all."""
        tensors = {f"{path}.{name}": tensor for path, block in sums.items() for name, tensor in block.sums().items()}
        write_artefact(self.path, FORMAT, tensors, {"run": self.run, "progress": dataclasses.asdict(progress)})

    def remove(self) -> None:
        """Deletes the file, once the statistics are safe."""
        self.path.unlink(missing_ok=True)


def check_save_every(save_every: int) -> None:
    """Refuses a negative number of micro-batches between two savings with a `HeaprError`."""
    if save_every < 0:
        raise HeaprError(f"save_every={save_every}: must be at least 0, where 0 saves only when interrupted")


def state_path(path: str | os.PathLike) -> Path:
    """Where this process has its state: the first at the path itself, the others beside it."""
    rank = int(os.environ.get("RANK", "0"))
    return Path(f"{os.fspath(path)}.{rank}" if rank else path)


def differences(
    first: dict[str, Any], second: dict[str, Any], wording: str = "{} was {}, is {}", prefix: str = ""
) -> list[str]:
    """A line for every part of a nested mapping that is not the same: its name and both values, put into `wording`."""
    found = []
    for key in sorted({*first, *second}):
        one, other = first.get(key), second.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, wording, f"{prefix}{key}.")
        elif one != other:
            found.append(wording.format(f"{prefix}{key}", json.dumps(one), json.dumps(other)))
    return found


class Interruption:
    """The first SIGTERM or Ctrl-C since [`interruption`] began, if any."""

    def __init__(self):
        self.signal: int | None = None

    def act(self) -> None:
        """Does what the signal asked for."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            sys.exit(128 + self.signal)


@contextmanager
def interruption(enabled: bool) -> Iterator[Interruption]:
    """Lets a micro-batch end before SIGTERM or Ctrl-C take effect; a second signal takes effect at once.

    Args:
        enabled (`bool`): otherwise, and outside the main thread, signals are left as they are.
    """
    caught = Interruption()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield caught
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number in numbers:
            signal.signal(number, previous[number] or signal.SIG_DFL)  # None: set outside Python

    def handle(number: int, frame: Any) -> None:
        caught.signal = number
        restore()

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield caught
    finally:
        restore()
