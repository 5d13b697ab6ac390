# Licensed under the Apache License, Version 2.0
"""Criteria: what makes an atomic expert important. One file each, one interface (`base.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.errors import HeaprError, did_you_mean
from ..utils.scratch import in_one_piece
from .activation import Activation
from .base import Criterion, ranked_below_reached
from .fisher import Fisher
from .frequency import Frequency
from .heapr import Heapr
from .magnitude import Magnitude
from .obs import Obs
from .random import Random
from .reap import Reap
from .sources import worst_of_sources


if TYPE_CHECKING:
    import torch

    from ..calibration.statistics import AtomicStatistics


CRITERIA: dict[str, type[Criterion]] = {
    criterion.name: criterion for criterion in (Heapr, Fisher, Obs, Magnitude, Activation, Reap, Frequency, Random)
}


def importance(
    statistics: AtomicStatistics,
    criterion: str = "heapr",
    seed: int = 0,
    reduction: str = "mean",
    ridge: float = 0.01,
    over_sources: str = "mean",
) -> dict[str, torch.Tensor]:
    """Importance of each atomic expert by block, [E, I]; higher is kept.

    Experts that no token reached have unknown statistics: they rank below every reached atomic expert, among themselves by
    weight norm.

    Args:
        statistics (`AtomicStatistics`): what calibration measured.
        criterion (`str`): one of `CRITERIA`.
        seed (`int`): of what is random.
        reduction (`str`): `mean` over the tokens of an expert, or `total` over all tokens.
        ridge (`float`): least regularization of what inverts a matrix.
        over_sources (`str`): `mean` over all of the text, or `max`, the score on the source that has the highest.

    Raises:
        HeaprError: if there is no such criterion, or it needs statistics that were not measured.
    """
    chosen = _chosen(criterion, seed, reduction, ridge)
    if over_sources == "max":
        scores = ((path, worst_of_sources(chosen, path, statistics)) for path in statistics.blocks)
    else:
        scores = ((path, chosen.score(path, block)) for path, block in statistics.blocks.items())
    scores = ranked_below_reached(scores, statistics) if chosen.needs_tokens else scores
    found: dict[str, torch.Tensor] = {}
    for path, score in scores:  # made as they are asked for: of millions, each is there once
        if not found:
            shapes = [(block.num_experts, block.width) for block in statistics.blocks.values()]
            found = dict(zip(statistics.blocks, in_one_piece(shapes, score.dtype)))
        found[path].copy_(score)
    return found


def expert_importance(
    statistics: AtomicStatistics,
    criterion: str = "heapr",
    seed: int = 0,
    reduction: str = "mean",
    ridge: float = 0.01,
    over_sources: str = "mean",
) -> dict[str, torch.Tensor]:
    """Importance of whole experts by block, [E] in float64: that of their atomic experts, over all of their tokens.

    Args: as for [`importance`].

    Raises:
        HeaprError: as there.
    """
    chosen = _chosen(criterion, seed, reduction, ridge)
    if over_sources == "max":
        return {path: worst_of_sources(chosen, path, statistics, experts=True).double() for path in statistics.blocks}
    return {path: chosen.expert_score(path, block).double() for path, block in statistics.blocks.items()}


def _chosen(criterion: str, seed: int, reduction: str, ridge: float) -> Criterion:
    if criterion not in CRITERIA:
        hint = did_you_mean(criterion, CRITERIA)
        raise HeaprError(f"criterion={criterion!r}: must be one of {', '.join(CRITERIA)}{hint}")
    return CRITERIA[criterion](seed, reduction, ridge)


__all__ = ["CRITERIA", "Criterion", "expert_importance", "importance"]
