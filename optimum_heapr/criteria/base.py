# Licensed under the Apache License, Version 2.0
"""The interface of a criterion, and what is done about experts that were never measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar


if TYPE_CHECKING:
    import torch

    from ..calibration.statistics import AtomicStatistics, BlockStatistics


class Criterion(ABC):
    """Scores atomic experts from their statistics.

    Attributes:
        name (`str`): how users call it.
        needs_tokens (`bool`): whether the score of an expert that no token reached is unknown.
    """

    name: ClassVar[str]
    needs_tokens: ClassVar[bool] = True

    def __init__(self, seed: int = 0):
        self.seed = seed

    @abstractmethod
    def score(self, path: str, block: BlockStatistics) -> torch.Tensor:
        """Importance of each atomic expert of the block at module path `path`, [E, I]; higher is kept."""


def ranked_below_reached(scores: dict[str, torch.Tensor], statistics: AtomicStatistics) -> dict[str, torch.Tensor]:
    """Gives atomic experts of unreached experts scores below every reached one, ordered by weight norm.

    Their sums are zero because nothing was measured, not because they do nothing; a negative score says "unknown" and
    still ranks them.
    """
    largest = max(float(block.weight_norm.max()) for block in statistics.blocks.values()) or 1.0
    ranked = {}
    for path, score in scores.items():
        block = statistics.blocks[path]
        unknown = block.weight_norm.to(score.dtype) / (2 * largest) - 1  # in (-1, -0.5]
        ranked[path] = score.where(block.reached.unsqueeze(1), unknown)
    return ranked
