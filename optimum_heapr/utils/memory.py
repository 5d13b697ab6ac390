# Licensed under the Apache License, Version 2.0
"""The most memory that was in use: of the CUDA devices if there are any, else of the process."""

from __future__ import annotations

import sys
from pathlib import Path


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measured_devices() -> range:
    """The CUDA devices that this process can have tensors on; none where the CPU was asked for."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return range(0)
    from .placement import has_accelerator

    if not has_accelerator():
        return range(0)
    torch.cuda.init()  # or there are no counts for devices that nothing was put on yet
    return range(torch.cuda.device_count())


def reset_peak_memory() -> None:
    """Starts a new measurement, where the system can: for a process, only Linux does."""
    if devices := measured_devices():
        import torch

        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _RESET.write_text("5")  # the high-water mark alone: man 5 proc
    except OSError:
        pass  # then the peak is that since the start


def peak_memory() -> int:
    """Bytes at most in use since [`reset_peak_memory`], or since the start where that cannot be reset.

    Of several devices, over which `device_map` may have spread a model, it is the sum.
    """
    if devices := measured_devices():
        import torch

        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
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
