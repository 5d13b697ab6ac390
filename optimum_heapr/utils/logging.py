# Licensed under the Apache License, Version 2.0
"""Loggers below `optimum.heapr`, and progress bars that stay quiet where nobody looks at them.

Optimum attaches its handler to the logger named `optimum`, so the names here begin with it: a user's
`optimum.utils.logging.set_verbosity_*` reaches them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from typing import Any


def get_logger(module: str) -> logging.Logger:
    """The logger of a module of this package: `optimum_heapr.planning.plan` logs as `optimum.heapr.planning.plan`."""
    return logging.getLogger("optimum.heapr" + module.removeprefix("optimum_heapr"))


def is_main_process() -> bool:
    """Whether this is rank 0, or the only process. Reads the environment, so it costs no import of torch."""
    return int(os.environ.get("RANK", "0")) == 0


def progress(iterable: Iterable | None = None, **kwargs: Any):
    """A `tqdm` bar: one for each phase of the pipeline.

    It is silent off a terminal, on every rank but the first, and when `HF_HUB_DISABLE_PROGRESS_BARS` is set.
    """
    from tqdm.auto import tqdm

    off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in {"1", "ON", "YES", "TRUE"}
    return tqdm(iterable, disable=off or not is_main_process() or not sys.stderr.isatty(), **kwargs)
