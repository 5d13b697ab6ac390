# Licensed under the Apache License, Version 2.0
"""The worst of several sources: atomic experts that one kind of text needs are kept, however little of it there is.

A mixture is ranked by its mean otherwise, in which a small source is outvoted (TB-Coverage, arXiv 2607.01710).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..utils.errors import HeaprError


if TYPE_CHECKING:
    from ..calibration.statistics import AtomicStatistics
    from .base import Criterion


def worst_of_sources(
    criterion: Criterion, path: str, statistics: AtomicStatistics, experts: bool = False
) -> torch.Tensor:
    """The highest of the scores that the sources of the text give each atomic expert of a block, [E, I], or each expert, [E].

    Scores that are sums over the tokens of a source count as if all of the text were of that source, so that large ones do not
    decide.

    Args:
        criterion (`Criterion`): one of `BY_SOURCE`.
        path (`str`): of the block.
        statistics (`AtomicStatistics`): with sums by source.
        experts (`bool`): score whole experts.

    Raises:
        HeaprError: if the sources were added up, or there is one alone.
    """
    found = statistics.by_source(path)
    if found is None:
        raise HeaprError(
            "reduction_over_sources='max': the statistics have no sums by source, as those of earlier versions; calibrate again"
        )
    if len(found) == 1:
        raise HeaprError(
            "reduction_over_sources='max': the calibration text is one source; name a mixture, a.jsonl:0.5,b.jsonl:0.5, or leave it "
            "out"
        )
    scores = [criterion.expert_score(path, block) if experts else criterion.score(path, block) for block in found]
    if criterion.needs_tokens if experts else criterion.has_reduction and criterion.reduction == "total":
        shares = [max(source["num_tokens"], 1) / statistics.num_tokens for source in statistics.sources]
        scores = [score / share for score, share in zip(scores, shares)]
    return torch.stack(scores).amax(0)
