# Licensed under the Apache License, Version 2.0
"""What a plan leaves of the size of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .plan import PruningPlan


@dataclass(frozen=True)
class PlannedSize:
    """A model before or after a plan is applied.

    Attributes:
        parameters (`int`): all of them.
        active_parameters (`int`, *optional*): those that a token uses on average: of the routed experts as many as the router
            takes, each as often as calibration tokens were routed to it. `None` where their number is not known.
        num_bytes (`int`, *optional*): of the weights, in the dtype of the calibration. `None` for plans that do not say.
    """

    parameters: int
    active_parameters: int | None
    num_bytes: int | None


def planned_sizes(plan: PruningPlan) -> tuple[PlannedSize, PlannedSize]:
    """Sizes before and after; zeros that stock layouts add, to experts or shared experts, are not counted."""
    unpruned = {path: [width] * len(plan.kept[path]) for path, width in plan.original_width.items()}
    dropped = len(next(iter(plan.dropped.values()), ()))
    return _size(plan, unpruned, plan.tokens), _size(plan, plan.routed_widths, plan.routed_tokens, dropped)


def _size(
    plan: PruningPlan, widths: dict[str, list[int]], tokens: dict[str, list[int]], dropped: int = 0
) -> PlannedSize:
    each, top_k = plan.model["parameters_per_atomic_expert"], plan.model.get("experts_per_token")
    saved = plan.storage["routing"] if dropped else {"parameters": 0, "bytes": 0}
    removed = plan.total - sum(map(sum, widths.values()))
    parameters = plan.model["num_parameters"] - removed * each - dropped * saved["parameters"]
    active = None
    if top_k is not None:
        unused = 0.0
        for path, experts in widths.items():
            counts = tokens.get(path) or [1] * len(experts)
            used = sum(count * width for count, width in zip(counts, experts, strict=True)) / (sum(counts) or 1)
            unused += sum(experts) - top_k * used
        active = round(parameters - each * unused)
    num_bytes = None
    if plan.storage:
        gone = removed * plan.storage["bytes_per_atomic_expert"] + dropped * saved["bytes"]
        num_bytes = plan.storage["num_bytes"] - gone
    return PlannedSize(parameters, active, num_bytes)
