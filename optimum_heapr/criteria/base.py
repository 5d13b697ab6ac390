# Licensed under the Apache License, Version 2.0
"""The interface of a criterion, and what is done about experts that were never measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar


if TYPE_CHECKING:
    import torch

    from ..calibration.statistics import AtomicStatistics, BlockStatistics


class Criterion(ABC):
    """Scores atomic experts from their statistics.

    Args:
        seed (`int`): of what is random.
        reduction (`str`): `mean` over the tokens routed to the expert, or `total` over all tokens; not every criterion
            makes the difference.
        ridge (`float`): least regularization of what inverts a matrix.

    Attributes:
        name (`str`): how users call it.
        needs_tokens (`bool`): whether the score of an expert that no token reached is unknown.
        has_reduction (`bool`): whether the reduction makes a difference.
    """

    name: ClassVar[str]
    needs_tokens: ClassVar[bool] = True
    has_reduction: ClassVar[bool] = False

    def __init__(self, seed: int = 0, reduction: str = "mean", ridge: float = 0.01):
        self.seed, self.reduction, self.ridge = seed, reduction, ridge

    @abstractmethod
    def score(self, path: str, block: BlockStatistics) -> torch.Tensor:
        """Importance of each atomic expert of the block at module path `path`, [E, I]; higher is kept."""

    def expert_score(self, path: str, block: BlockStatistics) -> torch.Tensor:
        """Importance of each whole expert, [E]: that of its atomic experts added up and, where it is one a token, times the tokens."""
        by_token = type(self)(self.seed, "mean", self.ridge)
        score = by_token.score(path, block).double().sum(1)
        return score * block.token_count if self.needs_tokens else score

    def reduced(self, mean: torch.Tensor, block: BlockStatistics) -> torch.Tensor:
        """A cost for each routed token, [E, I], as it is or, for `reduction="total"`, times the expert's tokens.

        Those that use it set `has_reduction`.
        """
        return mean * block.token_count.unsqueeze(1) if self.reduction == "total" else mean


class ExpertCriterion(Criterion):
    """Scores whole experts: the atomic experts of one share its score.

    Ties are broken by index and removal takes the higher one first, so experts go one after another and at most one of
    them is cut in part. Experts that no token reached have the score 0, not an unknown one.
    """

    needs_tokens = False

    @abstractmethod
    def expert_score(self, path: str, block: BlockStatistics) -> torch.Tensor:
        """Importance of each expert, [E]."""

    def score(self, path: str, block: BlockStatistics) -> torch.Tensor:
        return self.expert_score(path, block).unsqueeze(1).expand(-1, block.width)


def ranked_below_reached(
    scores: Iterable[tuple[str, torch.Tensor]], statistics: AtomicStatistics
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gives atomic experts of unreached experts scores below every reached one, ordered by weight norm; block by block.

    Their sums are zero because nothing was measured, not because they do nothing; a negative score says "unknown" and
    still ranks them.
    """
    largest = max(float(block.weight_norm.max()) for block in statistics.blocks.values()) or 1.0
    for path, score in scores:
        block = statistics.blocks[path]
        unknown = block.weight_norm.to(score.dtype) / (2 * largest) - 1  # in (-1, -0.5]
        yield path, score.where(block.reached.unsqueeze(1), unknown)
