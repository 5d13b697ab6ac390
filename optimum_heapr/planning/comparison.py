# Licensed under the Apache License, Version 2.0
"""Two plans of one model, layer by layer: how far they agree on what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..utils.errors import HeaprError


if TYPE_CHECKING:
    from .plan import PruningPlan


@dataclass(frozen=True)
class BlockComparison:
    """One expert block under two plans.

    Attributes:
        path (`str`): of the block, or `all`.
        total (`int`): atomic experts before pruning.
        kept (`tuple[int, int]`): of these, how many each plan keeps.
        both (`int`): how many both keep.
        loss_increase (`tuple[float, float]`): estimates, each by its own criterion's measure, nats a token.
        widths (`tuple`): the least and the largest width of an expert, in each plan.
    """

    path: str
    total: int
    kept: tuple[int, int]
    both: int
    loss_increase: tuple[float, float]
    widths: tuple[tuple[int, int], tuple[int, int]]

    @property
    def overlap(self) -> float:
        """Kept by both, as a share of what either keeps: 1 for equal sets, 0 for none in common."""
        either = sum(self.kept) - self.both
        return self.both / either if either else 1.0

    @property
    def by_chance(self) -> float:
        """The overlap that two sets of these sizes have if they are drawn at random, nearly."""
        both = self.kept[0] * self.kept[1] / self.total
        either = sum(self.kept) - both
        return both / either if either else 1.0


def compare_plans(first: PruningPlan, second: PruningPlan) -> list[BlockComparison]:
    """Both plans, block by block, and all blocks together at the end.

    Raises:
        HeaprError: if they are plans of models with other expert blocks, or other weights.
    """
    shapes = [
        {path: (len(experts), plan.original_width[path]) for path, experts in plan.kept.items()}
        for plan in (first, second)
    ]
    weights = [plan.model.get("weights") for plan in (first, second)]
    if shapes[0] != shapes[1] or weights[0] != weights[1]:
        what = "shapes of expert blocks" if shapes[0] != shapes[1] else "weights"
        raise HeaprError(
            f"plans: are of models with other {what}, and have nothing in common; name two plans of one model"
        )
    found = []
    for path, experts in first.kept.items():
        pairs = [(set(one.tolist()), set(other.tolist())) for one, other in zip(experts, second.kept[path])]
        kept = sum(len(one) for one, _ in pairs), sum(len(other) for _, other in pairs)
        total = len(experts) * first.original_width[path]
        both = sum(len(one & other) for one, other in pairs)
        losses = first.loss_increase[path], second.loss_increase[path]
        lengths = [[len(indices) for indices in plan.kept[path]] for plan in (first, second)]
        widths = tuple((min(each), max(each)) for each in lengths)
        found.append(BlockComparison(path, total, kept, both, losses, widths))
    return [*found, _together(found)]


def _together(blocks: list[BlockComparison]) -> BlockComparison:
    kept = tuple(sum(block.kept[side] for block in blocks) for side in (0, 1))
    losses = tuple(sum(block.loss_increase[side] for block in blocks) for side in (0, 1))
    widths = tuple(
        (min(block.widths[side][0] for block in blocks), max(block.widths[side][1] for block in blocks))
        for side in (0, 1)
    )
    total, both = (sum(getattr(block, name) for block in blocks) for name in ("total", "both"))
    return BlockComparison("all", total, kept, both, losses, widths)
