# Licensed under the Apache License, Version 2.0
"""What a calibration took: time and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..utils.memory import measured_devices, peak_memory, reset_peak_memory


@dataclass
class Cost:
    """What a calibration took, on this process.

    Attributes:
        tokens (`int`): tokens that were measured, padding not counted.
        seconds (`float`): time for them.
        peak_bytes (`int`): most memory in use: of the accelerator if there is one, else of the process since its start.
    """

    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def __str__(self) -> str:
        speed = self.tokens / self.seconds if self.seconds else 0.0
        return f"{speed:,.0f} tokens/s, at most {self.peak_bytes / 2**30:.2f} GiB of memory"


@contextmanager
def measured_cost() -> Iterator[Cost]:
    """Measures time and memory until the block ends; the tokens are the caller's to add."""
    cost, began, on_accelerator = Cost(), time.perf_counter(), bool(measured_devices())
    if on_accelerator:
        reset_peak_memory()
    yield cost
    cost.seconds = time.perf_counter() - began
    cost.peak_bytes = peak_memory() if on_accelerator else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory that this process had since its start."""
    try:
        # What the system reports of its use of resources may be that of the process that started this one.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # not on every system

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
