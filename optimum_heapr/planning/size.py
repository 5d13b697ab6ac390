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
    return _size(plan, unpruned), _size(plan, plan.widths)


def _size(plan: PruningPlan, widths: dict[str, list[int]]) -> PlannedSize:
    each, top_k = plan.model["parameters_per_atomic_expert"], plan.model.get("experts_per_token")
    removed = plan.total - sum(map(sum, widths.values()))
    parameters = plan.model["num_parameters"] - removed * each
    active = None
    if top_k is not None:
        unused = 0.0
        for path, experts in widths.items():
            tokens = plan.tokens.get(path) or [1] * len(experts)
            used = sum(count * width for count, width in zip(tokens, experts)) / (sum(tokens) or 1)
            unused += sum(experts) - top_k * used
        active = round(parameters - each * unused)
    num_bytes = None
    if plan.storage:
        num_bytes = plan.storage["num_bytes"] - removed * plan.storage["bytes_per_atomic_expert"]
    return PlannedSize(parameters, active, num_bytes)
