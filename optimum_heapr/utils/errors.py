# Licensed under the Apache License, Version 2.0
"""The one exception type for mistakes that a user can correct."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HeaprError(ValueError):
    """A wrong value, file or model.

    The message is one line that names the value, what is allowed and the next step. The command line prints it as it
    is and exits with status 2; anything else that is raised is a defect of this package or of the environment.
    """


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """A hint such as `; did you mean "ratio"?`, or an empty string if nothing in `allowed` is near `value`."""
    nearest = difflib.get_close_matches(str(value), list(allowed), n=1)
    return f'; did you mean "{nearest[0]}"?' if nearest else ""
