# Licensed under the Apache License, Version 2.0
"""What all commands share: errors as one line with exit status 2, and what is said when a run is interrupted."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, ClassVar

from optimum.commands.base import BaseOptimumCLICommand

from ..utils.errors import HeaprError


if TYPE_CHECKING:
    pass


class HeaprSubcommand(BaseOptimumCLICommand):
    """A command of `optimum-cli heapr`: subclasses set `NAME` and `HELP`, add their flags and implement `execute`."""

    NAME: ClassVar[str]
    HELP: ClassVar[str]

    def run(self) -> None:
        if not sys.stderr.isatty():
            # The libraries read these when they are imported, later: a log gets lines, an error is the only one.
            for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
                os.environ.setdefault(variable, "1")
        try:
            self.execute()
        except HeaprError as error:
            print(f"optimum-cli heapr {self.NAME}: error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as error:
            from ..utils.files import beside

            state = beside(getattr(self.args, "output", None) or "", ".state")
            left = str(error) or "nothing half-written was left behind"
            if hasattr(self.args, "resume") and os.path.exists(state):
                left = f"{state} holds what was done, and --resume goes on from there"
            print(f"optimum-cli heapr {self.NAME}: interrupted; {left}", file=sys.stderr)
            sys.exit(130)

    def execute(self) -> None:
        raise NotImplementedError
