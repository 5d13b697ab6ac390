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


def reason_of(error: BaseException) -> str:
    """Why a file could not be read, in one line and in the terms of whoever has the file: of a missing key or a value of a
    wrong type, Python says only where its reader stumbled."""
    if isinstance(error, KeyError) and error.args:
        return f"it has no {error.args[0]!r}"
    if isinstance(error, (TypeError, AttributeError, LookupError)):
        return "something in it is not of the kind that it must be"
    if isinstance(error, ValueError) and str(error).startswith(("invalid literal for", "could not convert string")):
        return f"something in it must be a number, and is {str(error).rpartition(': ')[2]}"
    if isinstance(error, StopIteration):
        return "it has no rows"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(str(error).split())[:300] or type(error).__name__


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """A hint such as `; did you mean "ratio"?`, or an empty string if nothing in `allowed` is near `value`."""
    nearest = difflib.get_close_matches(str(value), list(allowed), n=1)
    return f'; did you mean "{nearest[0]}"?' if nearest else ""
