# Licensed under the Apache License, Version 2.0
"""Random importance: the baseline that every other criterion has to beat."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch

from .base import Criterion


if TYPE_CHECKING:
    from ..calibration.statistics import BlockStatistics


class Random(Criterion):
    """Uniform numbers that depend on the seed and the block's path alone."""

    name = "random"
    needs_tokens = False

    def score(self, path: str, block: BlockStatistics) -> torch.Tensor:
        # One number of 32 bits from both: torch's generator ignores all higher bits of its seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {path}".encode()))
        return torch.rand(block.num_experts, block.width, generator=generator)
