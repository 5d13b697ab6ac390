# Licensed under the Apache License, Version 2.0
"""What the experts of a block give for some tokens, and what is to be made up for of that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..modeling.operations import linear


if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..experts import ExpertBlock


@dataclass
class BlockTarget:
    """
    Attributes:
        target (`torch.Tensor`): what the block gives and what stays of it does not give, [tokens, d].
        energy (`float`): squared output of all routed experts, summed over the tokens.
        atomic_energy (`float`): the same of all atomic experts one by one.
        fitted_with (`dict`): by number of each expert of which something stays, the tokens that it gets, [n]; its kept activations
            for these, router weight in, [n, w], in the type of the weights; and the sum of the mean squared activations.
    """

    target: torch.Tensor
    energy: float = 0.0
    atomic_energy: float = 0.0
    fitted_with: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = field(default_factory=dict)


def target_of(
    block: ExpertBlock,
    stays: torch.Tensor,
    hidden: torch.Tensor,
    routing: Sequence[torch.Tensor],
    anew: Sequence[torch.Tensor] | None,
) -> BlockTarget:
    """The target of these tokens.

    Args:
        block (`ExpertBlock`): experts of the unpruned model.
        stays (`torch.Tensor`): which atomic experts stay, bool [E, I].
        hidden (`torch.Tensor`): hidden states, [tokens, d].
        routing (`Sequence[torch.Tensor]`): experts of each token and their router weights, both [tokens, K].
        anew (`Sequence[torch.Tensor]`, *optional*): the same in the pruned model, if that is not the same.
    """
    stored = block.module.down_proj.dtype
    dtype = torch.promote_types(stored, torch.float32)
    output = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    found = BlockTarget(torch.zeros_like(output))
    for expert, is_kept in enumerate(stays):
        down = block.down_rows(expert).to(dtype)
        tokens, share, exact = _routed_to(block, expert, hidden, *routing)
        exact = exact.to(dtype)
        output.index_add_(0, tokens, exact @ down)
        found.atomic_energy += float(exact.square().sum(0) @ down.square().sum(1))
        if anew is None:
            found.target.index_add_(0, tokens, exact[:, ~is_kept] @ down[~is_kept])
        else:
            bias = block.module.down_proj_bias[expert] if block.module.has_bias else down.new_zeros(())
            found.target.index_add_(0, tokens, exact @ down + share * bias)
            tokens, share, exact = _routed_to(block, expert, hidden, *anew)
            exact = exact.to(dtype)
            found.target.index_add_(0, tokens, exact[:, is_kept] @ down[is_kept] + share * bias, alpha=-1)
        if is_kept.any():
            energy = float(exact.square().mean(1).sum())
            found.fitted_with[expert] = tokens, exact[:, is_kept].to(stored), energy
    found.energy = float(output.square().sum())
    return found


def _routed_to(
    block: ExpertBlock, expert: int, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tokens that an expert gets, [n], their router weights, [n, 1], and its activations with these in, [n, I]."""
    tokens, slot = torch.where(index == expert)
    share = weight[tokens, slot, None]
    return tokens, share, activations_of(block, expert, hidden[tokens]) * share


def activations_of(block: ExpertBlock, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """What the atomic experts of one expert are for these tokens, [n, I]."""
    module = block.module
    weight = module.gate_up_proj[expert]
    bias = module.gate_up_proj_bias[expert] if module.has_bias else None
    return module._apply_gate(linear(hidden, weight.T if module.is_transposed else weight, bias))
