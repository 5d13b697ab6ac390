# Licensed under the Apache License, Version 2.0
"""Weight magnitude: a baseline that looks at no data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Criterion


if TYPE_CHECKING:
    import torch

    from ..calibration.statistics import BlockStatistics


class Magnitude(Criterion):
    """Euclidean norm of the atomic expert's weights: gate row, up row and down column together."""

    name = "magnitude"
    needs_tokens = False

    def score(self, path: str, block: BlockStatistics) -> torch.Tensor:
        return block.weight_norm
