# Licensed under the Apache License, Version 2.0
"""Experts of many widths, cut into pieces of a few.

A fused kernel wants all its experts equally wide. An expert is a sum of atomic experts, so any cut of it is a sum of
narrower experts that fire together with the same router weight. Here every layer gets a few groups, each of one width, and
every expert at most one piece in each group: with groups of 256, 128 and 64, an expert of 300 is 256 + 64. G groups give up
to 2^G widths, where putting each expert whole into one of G groups gives G, and no token needs more than K pieces of a group.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil


# More zeros than this share of the weights are worth another group ...
MAX_PADDING = 0.08
# ... up to this many: every group is a kernel call of its own.
MAX_GROUPS = 5
# Widths are chosen among multiples of the widest expert's part of this: finer ones save no more than they cost to try.
MAX_UNITS = 48


@dataclass(frozen=True)
class Pieces:
    """How the experts of a layer are cut.

    Attributes:
        widths (`tuple[int, ...]`): width of each group, from wide to narrow.
        groups_of (`tuple[tuple[int, ...], ...]`): for each expert the groups that have a piece of it, in the order of
            its atomic experts; empty for an expert of width 0.
    """

    widths: tuple[int, ...]
    groups_of: tuple[tuple[int, ...], ...]

    @property
    def padded_width(self) -> int:
        """Sum of the widths of all pieces, zeros included."""
        return sum(self.widths[group] for groups in self.groups_of for group in groups)

    def experts_of(self, group: int) -> list[int]:
        """Experts that have a piece in a group, by number."""
        return [expert for expert, groups in enumerate(self.groups_of) if group in groups]

    def starts(self, expert: int) -> Iterator[tuple[int, int]]:
        """For each piece of an expert: its group and its first atomic expert."""
        start = 0
        for group in self.groups_of[expert]:
            yield group, start
            start += self.widths[group]


def cut(widths: list[int], multiple: int, keep_empty: bool = False) -> Pieces:
    """Cuts the experts of a layer so that few groups cost few zeros.

    All ways to divide the widest expert over one, two, ... `MAX_GROUPS` groups are tried, until one pads the layer by no
    more than `MAX_PADDING` or by no more than the multiple itself forces.

    Args:
        widths (`list[int]`): atomic experts of each expert.
        multiple (`int`): what the kernels need the width of a group to be a multiple of.
        keep_empty (`bool`): whether an expert of width 0 needs a piece, because a bias is left of it.

    Returns:
        [`Pieces`]
    """
    if not any(widths) and not keep_empty:  # a kernel wants an expert to call: one piece of zeros
        return Pieces((multiple,), ((0,), *[()] * (len(widths) - 1)))
    needed = tuple(max(width, 1) if keep_empty else width for width in widths)
    unit = multiple * ceil(max(needed) / (multiple * MAX_UNITS))
    units = [ceil(width / unit) for width in needed]
    allowed = max(int((1 + MAX_PADDING) * sum(widths)) // unit, sum(units))
    sizes = _fewest_groups(tuple(sorted(Counter(units).items())), allowed)
    subsets = _subsets(sizes)
    sums = sorted(subsets)
    groups_of = tuple(subsets[sums[bisect_left(sums, count)]] for count in units)
    return Pieces(tuple(size * unit for size in sizes), groups_of)


@lru_cache(maxsize=256)
def _fewest_groups(histogram: tuple[tuple[int, int], ...], allowed: int) -> tuple[int, ...]:
    """Sizes of the groups, in units, for experts of (units, how many): as few as cost no more than `allowed`, else the best."""
    best_cost, best = None, ()
    for groups in range(1, MAX_GROUPS + 1):
        for sizes in _partitions(histogram[-1][0], groups):
            cost = _cost(histogram, sizes)
            if best_cost is None or cost < best_cost:
                best_cost, best = cost, sizes
        if best_cost <= allowed:
            break
    return best


def _cost(histogram: tuple[tuple[int, int], ...], sizes: tuple[int, ...]) -> int:
    sums = sorted({sum(subset) for n in range(len(sizes) + 1) for subset in itertools.combinations(sizes, n)})
    return sum(experts * sums[bisect_left(sums, count)] for count, experts in histogram)


def _partitions(total: int, parts: int, largest: int | None = None) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as a sum of `parts` numbers, each no larger than the one before."""
    largest = total if largest is None else min(total, largest)
    if parts == 1:
        if 0 < total <= largest:
            yield (total,)
        return
    for first in range(largest, 0, -1):
        if first * parts < total:
            return
        for rest in _partitions(total - first, parts - 1, first):
            yield (first, *rest)


def _subsets(sizes: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """The groups that make up each sum, as few as do."""
    found: dict[int, tuple[int, ...]] = {}
    for n in range(len(sizes) + 1):
        for groups in itertools.combinations(range(len(sizes)), n):
            found.setdefault(sum(sizes[group] for group in groups), groups)
    return found
