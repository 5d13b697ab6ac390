# Licensed under the Apache License, Version 2.0
"""The most memory that was in use: of the accelerator if there is one, else of the process."""

from __future__ import annotations

import sys
from pathlib import Path


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Starts a new measurement, where the system can: for a process, only Linux does."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        _RESET.write_text("5")  # the high-water mark alone: man 5 proc
    except OSError:
        pass  # then the peak is that since the start


def peak_memory() -> int:
    """Bytes at most in use since [`reset_peak_memory`], or since the start where that cannot be reset."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
