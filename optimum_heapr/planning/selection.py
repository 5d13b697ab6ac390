# Licensed under the Apache License, Version 2.0
"""A threshold in many tensors at once, without a copy of them all: of a model there are millions of scores."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

import torch


_BITS = 16  # of a number's 64 that each pass counts; the table of counts is half a megabyte


def least_reaching(
    parts: Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor | None]]], amount: int
) -> tuple[float, int]:
    """The least value such that all up to it, each counted with its weight, make an amount.

    The bits of floating-point numbers, read as integers, are in the order of the numbers. So each of four passes counts the next
    bits of those that agree with the answer so far, and what is found is a value of `parts` and no approximation.

    Args:
        parts (`Callable`): gives the tensors anew for each pass: values, finite or infinite, [n, m], and weights, int64 [m], or
            `None` where each counts once.
        amount (`int`): at least 1, at most what all together weigh.

    Returns:
        `tuple[float, int]`: the value, and what all below it weigh, which is less than the amount.
    """
    found, below = 0, 0
    for shift in range(64 - _BITS, -1, -_BITS):
        counts = torch.zeros(2**_BITS + 1, dtype=torch.int64)
        first = -(2 ** (_BITS - 1)) if shift + _BITS == 64 else found << _BITS
        for values, weights in parts():
            place = (_ordered_bits(values) >> shift).sub_(first)
            # Counted apart, and not left out: pieces of many sizes would leave holes in memory.
            place.masked_fill_((place < 0) | (place >= 2**_BITS), 2**_BITS)
            weights = None if weights is None else weights.expand_as(place).flatten()
            counts += torch.bincount(place.flatten(), weights, minlength=len(counts)).long()
        counts = counts[:-1]
        total = counts.cumsum(0) + below
        place = int(torch.searchsorted(total, amount))
        below = int(total[place - 1]) if place else below
        found = first + place
    bits = found if found >= 0 else found ^ (2**63 - 1)
    return struct.unpack("d", struct.pack("q", bits))[0], below


def _ordered_bits(values: torch.Tensor) -> torch.Tensor:
    """Integers in the order of these numbers, equal for equal ones, int64."""
    bits = (values.double() + 0.0).view(torch.int64)  # there are two zeros, and the sum is one
    return torch.where(bits < 0, bits ^ (2**63 - 1), bits)
