# Licensed under the Apache License, Version 2.0
"""Optimal brain surgeon: what removing an atomic expert costs once the others make up for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..utils.errors import HeaprError
from ..utils.logging import progress
from ..utils.placement import default_device
from .base import Criterion
from .elimination import Elimination, greedy_elimination, ridge_for_tokens


if TYPE_CHECKING:
    from ..calibration.statistics import AtomicStatistics, BlockStatistics


# How much of the measured dependence between activation and gradient counts: 0 takes them as independent, 1 makes the
# cost of a single removal without compensation the token-level Fisher of `fisher`. `docs/source/benchmarks.md`.
TOKEN_DEPENDENCE = 0.5


class Obs(Criterion):
    """Position and cost in a greedy backward elimination of each expert; `elimination.py` has the formulas.

    The elimination takes activations and gradients as independent. How far a single atomic expert is from that is known,
    `rho_k = mean((h_k dL/dh_k)^2) / (mean(h_k^2) mean((dL/dh_k)^2))`, and part of it goes into the gradients' matrix.

    The cost is the increase of the loss summed over the calibration tokens, whatever the reduction: the steps of one
    expert add up to its part of the increase of the loss of the whole corpus.
    """

    name = "obs"

    def score(self, path: str, block: BlockStatistics) -> torch.Tensor:
        found = removal_curves(path, block, self.ridge)
        return scores_of_order(found.order, found.cost)

    def expert_score(self, path: str, block: BlockStatistics) -> torch.Tensor:
        """The costs of all steps of an expert, which are sums over its tokens."""
        return removal_curves(path, block, self.ridge).cost.sum(1)


def removal_curves(path: str, block: BlockStatistics, ridge: float = 0.01) -> Elimination:
    """In which order to remove the atomic experts of each expert, and the cost of each step, [E, I].

    A look-up if they are stored for this ridge, and the elimination itself if not; either gives the same numbers.

    Args:
        path (`str`): of the block, for messages.
        block (`BlockStatistics`): with removal curves or second-order statistics.
        ridge (`float`): least ridge; experts with few tokens get more.

    Returns:
        `Elimination`: costs in nats, summed over the calibration tokens, if the rest is compensated.

    Raises:
        HeaprError: if the statistics are vectors, without curves or with those for another ridge.
    """
    ridges = _ridges(block, ridge)
    if block.has_curves:
        if torch.equal(block.removal_ridge, ridges):
            return Elimination(block.removal_order.long(), block.removal_cost)
        if not block.has_grams:
            raise HeaprError(
                f"ridge={ridge}: the removal curves of {path} are those for another ridge, the least of them "
                f"{float(block.removal_ridge.min()):.4g}, and the matrices were left out; use that one or calibrate again"
            )
    block.check_grams(path, "criterion='obs'")
    # A few experts at a time: the matrices of a layer of a large model should be in memory once, not five times.
    parts = [_curves_from_matrices(block.of_experts(few), ridges[few]) for few in _few_at_a_time(block)]
    return Elimination(torch.cat([part.order for part in parts]), torch.cat([part.cost for part in parts]))


_MATRIX_NUMBERS_AT_ONCE = 2**24


def _few_at_a_time(block: BlockStatistics) -> Sequence[torch.Tensor]:
    return torch.arange(block.num_experts).split(max(1, _MATRIX_NUMBERS_AT_ONCE // block.width**2))


def _curves_from_matrices(block: BlockStatistics, ridges: torch.Tensor) -> Elimination:
    scale = token_dependence(block) ** (TOKEN_DEPENDENCE / 2)
    gradient_gram = block.mean("gradient_gram_sum") * scale.unsqueeze(1) * scale.unsqueeze(2)
    matrices = block.mean("activation_gram_sum").float(), gradient_gram.float()
    device = default_device()
    if device.type == "cuda":  # statistics are on the host, and there it takes minutes for a large model
        matrices = tuple(matrix.to(device) for matrix in matrices)
    found = greedy_elimination(*matrices, ridges)
    order, cost = found.order.cpu(), found.cost.cpu().double()
    # The ridge acts as activation that is not there, and experts have different ones.
    return Elimination(order, cost * (block.token_count / (1 + ridges)).unsqueeze(1))


def store_removal_curves(statistics: AtomicStatistics, ridge: float = 0.01) -> None:
    """Puts the removal curves of every block into `statistics`, so that planning with `obs` is a look-up at any ratio.

    Blocks that have them for this ridge are left as they are.

    Raises:
        HeaprError: if they would have to be computed and the statistics are vectors.
    """
    missing = [item for item in statistics.blocks.items() if not _are_stored(item[1], ridge)]
    if not missing:  # as for every plan but the first, which are not to show a bar each
        return
    bar = progress(missing, desc="Ordering", unit="layer")
    for path, block in bar:
        bar.set_postfix_str(path, refresh=False)
        statistics.blocks[path] = with_removal_curve(path, block, ridge)


def _are_stored(block: BlockStatistics, ridge: float) -> bool:
    scaled = block.removal_scale is not None or block.activation_gram_sum is None
    return block.has_curves and scaled and torch.equal(block.removal_ridge, _ridges(block, ridge))


def with_removal_curve(path: str, block: BlockStatistics, ridge: float = 0.01) -> BlockStatistics:
    """A block with its removal curves, as [`store_removal_curves`]."""
    found, scale = removal_curves(path, block, ridge), block.removal_scale
    if scale is None and block.activation_gram_sum is not None:
        energy = block.activation_gram_sum.diagonal(dim1=1, dim2=2).sum(1)
        scale = torch.where(energy > 0, block.activation_sq_sum.sum(1) / energy, 0)
    order, ridges = found.order.to(torch.int32), _ridges(block, ridge)
    return replace(block, removal_order=order, removal_cost=found.cost, removal_ridge=ridges, removal_scale=scale)


def _ridges(block: BlockStatistics, ridge: float) -> torch.Tensor:
    """The ridge of each expert, [E]."""
    return torch.tensor([ridge_for_tokens(ridge, block.width, count) for count in block.token_count.tolist()])


def token_dependence(block: BlockStatistics) -> torch.Tensor:
    """`mean((h dL/dh)^2) / (mean(h^2) mean((dL/dh)^2))`, [E, I]: 1 if the two are independent, or were never seen."""
    apart = block.mean("activation_sq_sum").double() * block.mean("gradient_sq_sum").double()
    ratio = block.mean("fisher_sum").double() / apart
    # Few tokens give wild ratios.
    return torch.where(apart > 0, ratio, 1).clamp(0.01, 100).to(block.fisher_sum.dtype)


def scores_of_order(order: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """Scores that sort into a removal order exactly, [E, I] in float64.

    A step that costs less than one before it cannot be taken alone, so the score is the running maximum of the cost.
    Equal ones are then told apart by the least that float64 can: seen as integers, neighbouring positive numbers differ
    by one.

    Args:
        order (`torch.Tensor`): `order[e, s]` is the atomic expert that step s removes, [E, I].
        cost (`torch.Tensor`): of each step, at least 0, [E, I].
    """
    steps = torch.arange(cost.shape[1], device=cost.device)
    bits = cost.double().clamp(min=torch.finfo(torch.float64).tiny).view(torch.int64)
    rising = ((bits - steps).cummax(dim=1).values + steps).view(torch.float64)
    return torch.empty_like(rising).scatter_(1, order, rising)
