# Licensed under the Apache License, Version 2.0
"""Memory that is used again and again. On a CPU the first touch of new pages can take longer than what is computed in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def in_one_piece(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors without values of these shapes, one after another in one piece of memory on the CPU.

    Where many that stay are made one by one among others that go, the latter leave holes which glibc does not fill again with what has
    their size, as tensors are aligned: the process then has about twice the memory that is in use.
    """
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(*shape) for part, shape in zip(torch.empty(sum(sizes), dtype=dtype).split(sizes), shapes)]
