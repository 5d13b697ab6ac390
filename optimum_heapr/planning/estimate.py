# Licensed under the Apache License, Version 2.0
"""What a plan is expected to cost: the second-order increase of the loss, from statistics alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from ..calibration.statistics import AtomicStatistics, BlockStatistics
    from ..configuration import HeaprConfig


def estimated_loss_increase(
    block: BlockStatistics, kept: list[torch.Tensor], num_tokens: int, config: HeaprConfig
) -> float:
    """Increase of the loss when the other atomic experts of one block go, in nats a token. No matrix is read for it.

    Where compensation is asked for and what goes are beginnings of the removal curves, as with criterion `obs`, it is what
    the curves say: atomic experts of one expert together, the rest making up for them, ridge included. Otherwise atomic
    experts are added up as if each went alone and nothing made up for it. Experts and blocks are always added up, and
    experts that no token reached count for nothing.

    Args:
        block (`BlockStatistics`): what was measured.
        kept (`list[torch.Tensor]`): for each expert what stays.
        num_tokens (`int`): calibration tokens.
        config (`HeaprConfig`): `compensate` is used.
    """
    removed = _removed(block, kept)
    if config.compensate and block.has_curves and block.removal_scale is not None:
        steps = removed.gather(1, block.removal_order.long())
        if (steps[:, 1:] <= steps[:, :-1]).all():  # over a block, this is an upper bound
            cost = block.removal_cost * block.removal_scale.double().unsqueeze(1)
            return float(cost[steps].sum()) / num_tokens
    return float(_cost(block, num_tokens)[removed].sum())


def increase_by_source(statistics: AtomicStatistics, kept: dict[str, list[torch.Tensor]]) -> list[dict[str, Any]]:
    """What the text of each source alone loses, as [`estimated_loss_increase`] without compensation.

    Args:
        statistics (`AtomicStatistics`): of the whole text.
        kept (`dict`): by block path, for each expert what stays.

    Returns:
        `list[dict]`: `name` and `increase`, nats a token, of each source; empty if there is one alone, or they were added up.
    """
    sources = [{"name": source["name"], "increase": 0.0} for source in statistics.sources]
    for path, experts in kept.items():
        found = statistics.by_source(path)
        if found is None or len(found) < 2:
            return []
        for source, about, block in zip(sources, statistics.sources, found):
            cost = _cost(block, max(about["num_tokens"], 1))
            source["increase"] += float(cost[_removed(block, experts)].sum())
    return sources


def _removed(block: BlockStatistics, kept: list[torch.Tensor]) -> torch.Tensor:
    """Which atomic experts go of those that tokens reached, [E, I]."""
    removed = torch.ones(block.num_experts, block.width, dtype=torch.bool)
    expert = torch.arange(block.num_experts).repeat_interleave(torch.tensor([len(indices) for indices in kept]))
    removed[expert, torch.cat(kept)] = False
    return removed & block.reached.unsqueeze(1)


def _cost(block: BlockStatistics, num_tokens: int) -> torch.Tensor:
    """What each atomic expert costs if it goes alone, nats a token, [E, I]."""
    return 0.5 * block.activation_sq_sum.double() * block.mean("gradient_sq_sum") / num_tokens
