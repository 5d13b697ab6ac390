# Licensed under the Apache License, Version 2.0
"""Many processes: each measures its share of the samples, and the sums are added at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from ..utils.errors import HeaprError
from .statistics import BlockStatistics


if TYPE_CHECKING:
    from accelerate import Accelerator

    from .state import Progress


PATIENCE = timedelta(days=1)
"""How long a process that is done waits for the others. Shares may take hours longer than one another: hosts differ, and a
resumed process may have more left. One that died does not take this long to be noticed: its connection is closed, or the
launcher ends the run."""


def start_processes() -> Accelerator:
    """Connects the processes of this run, if there are several."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


def check_placement(model: torch.nn.Module, num_processes: int) -> None:
    """Refuses a model whose parts are spread over devices by each of several processes.

    Raises:
        HeaprError: naming the devices.
    """
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if num_processes > 1 and len(devices) > 1:
        raise HeaprError(
            f"device_map: spreads the model over {', '.join(sorted(devices))}, and each of {num_processes} processes would "
            "do so; launch one process, or leave device_map out (--memory plain)"
        )


def add_over_processes(
    accelerator: Accelerator, statistics: dict[str, BlockStatistics], done: Progress
) -> tuple[dict[str, BlockStatistics], float, int, list[int]]:
    """The sums of all processes, on each of them.

    Returns:
        `tuple`: statistics by block path, summed loss, tokens predicted, and samples that were left out.

    Raises:
        HeaprError: if another process ended before.
    """
    summed = {path: add_block(accelerator, block) for path, block in statistics.items()}
    return summed, *add_progress(accelerator, done)


def add_block(accelerator: Accelerator, block: BlockStatistics) -> BlockStatistics:
    """The sums of one expert block over all processes, on each of them.

    Raises:
        HeaprError: if another process ended before.
    """
    with _peers_needed():
        return replace(block, **{name: _added(accelerator, tensor) for name, tensor in block.sums.items()})


def add_progress(accelerator: Accelerator, done: Progress) -> tuple[float, int, list[int]]:
    """Summed loss, tokens predicted, and samples that were left out, over all processes.

    Raises:
        HeaprError: if another process ended before.
    """
    from accelerate.utils import gather_object

    with _peers_needed():
        loss, targets = _added(accelerator, torch.tensor([done.loss, done.targets], dtype=torch.float64)).tolist()
        return loss, int(targets), sorted(gather_object(done.skipped))


def _added(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    return accelerator.reduce(tensor.to(accelerator.device), "sum").cpu()


@contextmanager
def _peers_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise HeaprError(
            f"processes: another one ended before the sums could be added ({reason}); see what it printed, and run again, "
            "with --resume if --save-every was on"
        ) from error
