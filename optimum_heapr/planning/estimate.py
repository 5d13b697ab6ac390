# Licensed under the Apache License, Version 2.0
"""What a plan is expected to cost: the second-order increase of the loss, from statistics alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..criteria.elimination import ridge_for_tokens


if TYPE_CHECKING:
    from ..calibration.statistics import BlockStatistics
    from ..configuration import HeaprConfig


def estimated_loss_increase(
    block: BlockStatistics, kept: list[torch.Tensor], num_tokens: int, config: HeaprConfig
) -> float:
    """Increase of the loss when the other atomic experts of one block go, in nats a token.

    With second-order statistics, atomic experts of one expert are taken together, and what compensation leaves over is
    what counts; without them they are added up as if each went alone. Experts and blocks are always added up, and
    experts that no token reached count for nothing.

    Args:
        block (`BlockStatistics`): what was measured.
        kept (`list[torch.Tensor]`): for each expert what stays.
        num_tokens (`int`): calibration tokens.
        config (`HeaprConfig`): `compensate` and `ridge` are used.
    """
    removed = torch.ones(block.num_experts, block.width, dtype=torch.bool)
    for expert, indices in enumerate(kept):
        removed[expert, indices] = False
    if not block.has_grams:
        cost = 0.5 * block.activation_sq_sum.double() * block.mean("gradient_sq_sum") / num_tokens
        return float(cost[removed].sum())
    return (
        sum(
            _joint_cost(block, expert, removed[expert], config)
            for expert in range(block.num_experts)
            if block.token_count[expert] > 0 and removed[expert].any()
        )
        / num_tokens
    )


def _joint_cost(block: BlockStatistics, expert: int, removed: torch.Tensor, config: HeaprConfig) -> float:
    """`1/2 trace(S M)` over the removed atomic experts R of one expert, in nats over all calibration tokens.

    `M = E[(dL/dh) (dL/dh)^T]`, and `S = E[h_R h_R^T]`, or of what compensation leaves over of `h_R`. The router weight is
    part of `dL/dh`, so here the activations, measured with it, are brought to the mean square that they have without.
    """
    tokens = int(block.token_count[expert])
    gram = block.activation_gram_sum[expert].double()
    energy = gram.diagonal().sum()
    if energy <= 0:
        return 0.0
    gram = gram * (block.activation_sq_sum[expert].double().sum() / energy)
    residual = gram[removed][:, removed]
    kept = ~removed
    if config.compensate and kept.any():  # over a block, this is an upper bound
        ridge = ridge_for_tokens(config.ridge, block.width, tokens) * gram.diagonal().mean()
        among, across = gram[kept][:, kept], gram[kept][:, removed]
        weights = torch.linalg.solve(among + ridge * torch.eye(len(among), dtype=gram.dtype), across)
        # With a ridge the weights are not those of least error, so all four terms of the error stay.
        residual = residual - weights.T @ across - across.T @ weights + weights.T @ among @ weights
    gradient_gram = block.gradient_gram_sum[expert].double() / tokens
    return 0.5 * float((residual * gradient_gram[removed][:, removed]).sum())
