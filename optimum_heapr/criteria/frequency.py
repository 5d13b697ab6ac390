# Licensed under the Apache License, Version 2.0
"""Routing frequency: a baseline that ranks whole experts by how often they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import ExpertCriterion


if TYPE_CHECKING:
    import torch

    from ..calibration.statistics import BlockStatistics


class Frequency(ExpertCriterion):
    """Tokens routed to the expert."""

    name = "frequency"

    def expert_score(self, path: str, block: BlockStatistics) -> torch.Tensor:
        return block.token_count.double()
