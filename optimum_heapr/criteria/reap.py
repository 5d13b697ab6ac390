# Licensed under the Apache License, Version 2.0
"""REAP: router-weighted expert activation, a baseline that ranks whole experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.errors import HeaprError
from .base import ExpertCriterion


if TYPE_CHECKING:
    import torch

    from ..calibration.statistics import BlockStatistics


class Reap(ExpertCriterion):
    """`mean(r ||E(x)||)` over the tokens routed to the expert, `r` the router weight (arXiv 2510.13999).

    Comparable within a layer; REAP removes the same share of every layer (`allocation="layer"`). Here the router still
    knows the experts that lost all of their atomic experts, where REAP takes them out of it.
    """

    name = "reap"

    def expert_score(self, path: str, block: BlockStatistics) -> torch.Tensor:
        if block.output_norm_sum is None:
            raise HeaprError(f"criterion='reap': the statistics of {path} hold no output norms; calibrate again")
        return block.mean("output_norm_sum")
