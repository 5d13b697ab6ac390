# Licensed under the Apache License, Version 2.0
"""What a plan is expected to cost: the second-order increase of the loss, from statistics alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from ..calibration.statistics import BlockStatistics
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
    removed = torch.ones(block.num_experts, block.width, dtype=torch.bool)
    expert = torch.arange(block.num_experts).repeat_interleave(torch.tensor([len(indices) for indices in kept]))
    removed[expert, torch.cat(kept)] = False
    removed &= block.reached.unsqueeze(1)
    if config.compensate and block.has_curves and block.removal_scale is not None:
        steps = removed.gather(1, block.removal_order.long())
        if (steps[:, 1:] <= steps[:, :-1]).all():  # over a block, this is an upper bound
            cost = block.removal_cost * block.removal_scale.double().unsqueeze(1)
            return float(cost[steps].sum()) / num_tokens
    cost = 0.5 * block.activation_sq_sum.double() * block.mean("gradient_sq_sum") / num_tokens
    return float(cost[removed].sum())
