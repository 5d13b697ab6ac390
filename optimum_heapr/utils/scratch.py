# Licensed under the Apache License, Version 2.0
"""Memory that is used again and again. On a CPU the first touch of new pages can take longer than what is computed in them."""

from __future__ import annotations

import math

import torch


class Scratch:
    """Tensors without values, by name, in memory that is kept; one of the same name takes the place of the one before."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._options = {"dtype": dtype, "device": device}
        self._kept: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        numbers = math.prod(shape)
        if name not in self._kept or len(self._kept[name]) < numbers:
            self._kept[name] = torch.empty(numbers, **self._options)
        return self._kept[name][:numbers].view(shape)
