# Licensed under the Apache License, Version 2.0
"""Threads in the place of processes: what one process of several does, without the seconds in which one starts.

What connects processes, the collectives of accelerate and torch that this package uses, works among the threads. One that ends with
an error ends the others where they wait for it, as a process that dies does.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedModel


class Ranks:
    """
    Several ranks, each a thread.

    Args:
        monkeypatch (`pytest.MonkeyPatch`): puts the collectives in the place of those of accelerate.
        number (`int`): of ranks.
    """

    def __init__(self, monkeypatch, number: int = 2):
        self.number = number
        self._here = threading.local()
        self._barrier = threading.Barrier(number, timeout=60)
        self._held: list[Any] = [None] * number
        monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda values, rank=0: self._all(values)[rank])
        monkeypatch.setattr("accelerate.utils.gather_object", lambda values: sum(self._all(values), []))
        monkeypatch.setattr("torch.distributed.all_reduce", self._sum)
        monkeypatch.setattr("torch.distributed.reduce", self._sum)
        for module in ("runner", "streaming"):
            monkeypatch.setattr(f"optimum_heapr.calibration.{module}.start_processes", lambda *_: self)
        for module in (
            "surgery.apply",
            "checkpoints.loaded",
            "checkpoints.streamed",
            "checkpoints.cutting",
            "checkpoints.saving",
        ):
            monkeypatch.setattr(f"optimum_heapr.{module}.connected_processes", lambda: self)

        # While transformers makes or loads a model it swaps methods of the class and the default type of torch, for all threads: of
        # two at once one swaps them for good.
        alone = threading.RLock()
        for name in ("from_pretrained", "_from_config"):
            make = getattr(PreTrainedModel, name).__func__
            monkeypatch.setattr(PreTrainedModel, name, classmethod(_one_after_another(make, alone)))

    num_processes = property(lambda self: self.number)
    process_index = property(lambda self: self._here.rank)
    is_main_process = property(lambda self: self._here.rank == 0)
    device = torch.device("cpu", 0)  # as accelerate has it for several processes

    def _sum(self, tensor: torch.Tensor, dst: int | None = None) -> None:
        """In place, on one rank or on all; elsewhere nothing is left that could be used."""
        total = torch.stack(self._all(tensor.clone())).sum(0)  # processes share no memory, which one goes on to change
        tensor.copy_(total) if dst in (None, self.process_index) else tensor.zero_()

    def _all(self, value: Any) -> list[Any]:
        self._held[self._here.rank] = value
        self._barrier.wait()
        found = list(self._held)
        self._barrier.wait()
        return found

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """What `function(rank)` gives on each; raises the error that was first."""
        self._barrier.reset()
        errors: list[BaseException] = []

        def on(rank: int) -> Any:
            self._here.rank = rank
            try:
                return function(rank)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        with ThreadPoolExecutor(self.number) as pool:
            found = list(pool.map(on, range(self.number)))
        if errors:
            raise errors[0]
        return found


def _one_after_another(function: Callable, alone: threading.RLock) -> Callable:
    @functools.wraps(function)
    def one_after_another(*arguments, **options):
        with alone:
            return function(*arguments, **options)

    return one_after_another
