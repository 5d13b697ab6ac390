# Licensed under the Apache License, Version 2.0
"""HEAPr: the paper's second-order importance in the expert's output space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Criterion


if TYPE_CHECKING:
    import torch

    from ..calibration.statistics import BlockStatistics


class Heapr(Criterion):
    """`1/2 mean(e_k^T G e_k)` of arXiv 2509.22299, computed as `1/2 mean(h_k^2) mean((dL/dh_k)^2)`.

    Means are over the tokens routed to the expert, as in the paper; `reduction="total"` weighs experts by how many these
    are. `docs/source/concepts/one_pass.md` has the proof.
    """

    name = "heapr"
    has_reduction = True

    def score(self, path: str, block: BlockStatistics) -> torch.Tensor:
        # In float64: the product of two small means would underflow in float32 and become a tie.
        return self.reduced(0.5 * block.mean("activation_sq_sum").double() * block.mean("gradient_sq_sum"), block)
