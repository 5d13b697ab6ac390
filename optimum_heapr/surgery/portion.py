# Licensed under the Apache License, Version 2.0
"""The calibration text shared out among processes: each takes a run of it through the layers, and sums are over all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.processes import added, check_same_run, from_process, peers_needed


if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..text.samples import CalibrationData


Added = Callable[[torch.Tensor], torch.Tensor]
"""Gives the sum of a tensor, which may be overwritten, over all processes, on each of them."""


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over one process."""
    return tensor


def numbers(added: Added, values: Sequence[float]) -> list[float]:
    """The sum of each number over all processes."""
    return added(torch.tensor(values, dtype=torch.float64)).tolist()


class Portion:
    """
    What one process has of the calibration text: micro-batches that follow one another. Those of rank 0 come first.

    Args:
        data (`CalibrationData`): tokenized samples.
        batch_size (`int`): of them in a micro-batch.
        accelerator (`Accelerator`, *optional*): connects the processes; without one all of the text is here.

    Attributes:
        batches (`dict[int, dict]`): by number, micro-batches as of [`~CalibrationData.micro_batches`], and `counts`, bool [samples,
            tokens]: which of the tokens count. Where there are fewer than processes, some have one of which none counts.
        first, here, tokens (`int`): tokens that count before this portion, in it, and in all.
    """

    def __init__(self, data: CalibrationData, batch_size: int, accelerator: Accelerator | None = None):
        self._accelerator = accelerator
        number, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
        batches = list(data.micro_batches(batch_size))
        counts = [batch["attention_mask"].bool() for batch in batches]
        start, end = (len(batches) * turn // number for turn in (rank, rank + 1))
        self.batches = {index: {**batches[index], "counts": counts[index]} for index in range(start, end)}
        self.batches = self.batches or {0: {**batches[0], "counts": torch.zeros_like(counts[0])}}
        self.first, self.here, self.tokens = (
            sum(int(part.sum()) for part in parts) for parts in (counts[:start], counts[start:end], counts)
        )

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self._accelerator is None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that reads and writes what there is one of."""
        return self._accelerator is None or self._accelerator.process_index == 0

    def own(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of tokens, by number in the whole text, those that are here, by number in this portion."""
        tokens = tokens - self.first
        return tokens[(tokens >= 0) & (tokens < self.here)]

    def added(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, on each of them the same bits; the tensor may be overwritten.

        Raises:
            HeaprError: if another process ended before.
        """
        if self._accelerator is None:
            return tensor
        with peers_needed():
            return added(self._accelerator, tensor)

    def of_first(self, value: Any) -> Any:
        """What the first process has, on each of them.

        Raises:
            HeaprError: if another process ended before.
        """
        return value if self._accelerator is None else from_process(self._accelerator, value)

    def check_same(self, run: dict[str, Any]) -> None:
        """Refuses processes that are not about the same.

        Args:
            run (`dict`): what the sums of this process depend on, plain JSON types.

        Raises:
            HeaprError: naming what differs, or if another process ended before.
        """
        if self._accelerator is not None:
            check_same_run(self._accelerator, run)
