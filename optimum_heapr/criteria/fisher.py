# Licensed under the Apache License, Version 2.0
"""The diagonal of the Fisher matrix of masks on atomic experts, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Criterion


if TYPE_CHECKING:
    import torch

    from ..calibration.statistics import BlockStatistics


class Fisher(Criterion):
    """`1/2 mean((h_k dL/dh_k)^2)`: activation and gradient of the same token are multiplied before the mean.

    HEAPr takes the two means apart, which assumes that they are independent; this does not.
    """

    name = "fisher"
    has_reduction = True

    def score(self, path: str, block: BlockStatistics) -> torch.Tensor:
        return self.reduced(0.5 * block.mean("fisher_sum"), block)
