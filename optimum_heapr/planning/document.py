# Licensed under the Apache License, Version 2.0
"""The document of a plan's file: what it must hold, whoever wrote it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..utils.artefacts import MODEL_PARTS, check_parts
from ..utils.errors import HeaprError


if TYPE_CHECKING:
    import torch


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
    check_parts(document, {name: list for name in ("rectangles", "sources") if name in document})
    for source in document.get("sources", []):
        check_parts(source, {"name": str, "increase": (float, int)})


def check_layout(dropped: dict[str, list[int]], layout: str) -> None:
    """Refuses experts that go from routers where the layout has routers of all experts.

    Raises:
        HeaprError: naming the layout.
    """
    if dropped and layout != "uniform":
        raise HeaprError(
            f"plan: drops experts from routers, which layout='uniform' alone can, and its layout is {layout!r}; plan again"
        )


def check_dropped(dropped: dict[str, list[int]], kept: dict[str, list[torch.Tensor]], storage: dict[str, Any]) -> None:
    """Refuses experts that go from routers and are not empty, or more of one block than of another.

    Args:
        dropped (`dict[str, list[int]]`): of a plan, by block path.
        kept (`dict[str, list[torch.Tensor]]`): by block path, for each expert the kept indices.
        storage (`dict`): of the plan; says what goes with an expert besides.

    Raises:
        HeaprError: naming the block.
    """
    if not dropped:
        return
    if set(dropped) != set(kept) or len(set(map(len, dropped.values()))) > 1:
        raise HeaprError("plan: each block must drop the same number of experts from its router; plan again")
    if not {"parameters", "bytes"} <= set(storage.get("routing", {})):
        raise HeaprError("plan: drops experts, and does not say what rows of routers go with them; plan again")
    for path, numbers in dropped.items():
        experts = kept[path]
        if sorted(set(numbers)) != numbers or not all(0 <= number < len(experts) for number in numbers):
            raise HeaprError(
                f"plan: the experts {numbers} that {path} drops must rise within [0, {len(experts)}); plan again"
            )
        filled = next((number for number in numbers if len(experts[number])), None)
        if filled is not None or len(numbers) == len(experts):
            raise HeaprError(
                f"plan: {path} drops expert {numbers[0] if filled is None else filled}, and must keep an expert, and nothing of "
                "those that it drops; plan again"
            )
