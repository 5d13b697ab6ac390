# Licensed under the Apache License, Version 2.0
"""Mean squared activation: a baseline that looks at the data but not at the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Criterion


if TYPE_CHECKING:
    import torch

    from ..calibration.statistics import BlockStatistics


class Activation(Criterion):
    """`mean(h_k^2)` over the tokens routed to the expert."""

    name = "activation"

    def score(self, path: str, block: BlockStatistics) -> torch.Tensor:
        return block.mean("activation_sq_sum")
