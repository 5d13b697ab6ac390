# Licensed under the Apache License, Version 2.0
"""Folders that last as long as what refers to them."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path


class TemporaryFolder:
    """A folder that is there as long as this object is, or the process: for files that tensors are mapped from.

    What is still mapped then may be impossible to delete, on network file systems for one. Nothing is lost by that, so it is
    no error.

    Args:
        parent (`str`, *optional*): made if need be; by default that of the system.
    """

    def __init__(self, parent: str | os.PathLike | None = None):
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix="heapr-", dir=parent))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
