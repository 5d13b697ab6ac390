# Licensed under the Apache License, Version 2.0
"""The document of a plan's file: what it must hold, whoever wrote it."""

from __future__ import annotations

from typing import Any

from ..utils.artefacts import MODEL_PARTS, check_parts


NEWER = ("compensation", "reconstruction", "data", "tokens", "storage", "importance", "dropped")
"""Parts that a plan of an earlier version may lack; they are empty then."""


def check_document(document: dict[str, Any]) -> None:
    """Refuses one that lacks what later stages read, or has something else there.

    Raises:
        KeyError: if it lacks a part.
        ValueError: if a part is of another type.
    """
    needed = ("original_width", "config", "model", "loss_increase", "unreached")
    check_parts(document, {"blocks": list, **dict.fromkeys(needed, dict)})
    check_parts(document["model"], MODEL_PARTS)
    check_parts(document["loss_increase"], dict.fromkeys(document["blocks"], (float, int)))
    check_parts(document["original_width"], dict.fromkeys(document["blocks"], int))
    check_parts(document, {name: dict for name in NEWER if name in document})
    check_parts(document, {"rectangles": list} if "rectangles" in document else {})
