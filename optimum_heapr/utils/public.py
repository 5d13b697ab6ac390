# Licensed under the Apache License, Version 2.0
"""What may leave this machine with a model: names, without the places where they are."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any


# Parts of a mixture, or of statistics that were merged, and what stands behind a name: `[split]` and `:weight`.
_SEPARATOR = re.compile(r"(,(?![^\[]*\])| \+ )")
_PART = re.compile(r"(?P<name>.*?)(?P<rest>(\[[^\]]*\])?(:[-+\d.eE]+)?)", re.DOTALL)
_FOLDERS = re.compile(r"(?<![\w/:.])~?/(?:[^\s/'\",;:()]+/)+")


def public_name(source: str) -> str:
    """A name as it is; of a path, and of the parts of a mixture, the end: the folders above it are nobody's business.

    A folder ends with `/`, so that nobody takes it for a name on the Hub.
    """
    if not source or os.path.exists(source):
        return source and _end(source)
    parts = _SEPARATOR.split(source)
    return "".join(part if index % 2 else _public_part(part) for index, part in enumerate(parts))


def public_data(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of calibration text with names in place of paths."""
    changed = {"source": public_name(fingerprint["source"])} if "source" in fingerprint else {}
    if "sources" in fingerprint:
        changed["sources"] = [{**part, "name": public_name(part["name"])} for part in fingerprint["sources"]]
    return {**fingerprint, **changed}


def public_text(text: str) -> str:
    """A sentence, such as that of an error, in which of absolute paths only the end is left."""
    return _FOLDERS.sub("", text)


def _public_part(part: str) -> str:
    if os.path.exists(part):
        return _end(part)
    found = _PART.fullmatch(part)
    name = found["name"]
    is_local = os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1 or os.path.exists(name)
    return (_end(name) if is_local else name) + found["rest"]


def _end(path: str) -> str:
    return Path(os.path.abspath(path)).name + ("/" if os.path.isdir(path) else "")
