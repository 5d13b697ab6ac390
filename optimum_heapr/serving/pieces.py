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
from math import ceil, inf


# More zeros than this share of the weights are worth another group ...
MAX_PADDING = 0.08
# ... up to this many: every group is a kernel call of its own.
MAX_GROUPS = 5
# Where memory allows, too, but for this share of the cost at least.
WORTH_A_GROUP = 0.01
# Reading a token for one more piece, and adding what that gives, takes as long as so many columns do (vLLM's CPU kernel).
COLUMNS_A_PIECE = 32
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
    """Cuts the experts of a layer so that few groups cost few zeros, and experts have few pieces.

    Groups are added, up to `MAX_GROUPS`, until they pad the layer by no more than `MAX_PADDING`, or by no more than the
    multiple itself forces; and further where pieces become so few that it is worth a group.

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
    sizes = _groups(tuple(sorted(Counter(units).items())), allowed, COLUMNS_A_PIECE / unit)
    subsets = _subsets(sizes)
    sums = sorted(subsets)
    groups_of = tuple(subsets[sums[bisect_left(sums, count)]] for count in units)
    return Pieces(tuple(size * unit for size in sizes), groups_of)


@lru_cache(maxsize=256)
def _groups(histogram: tuple[tuple[int, int], ...], allowed: int, piece: float) -> tuple[int, ...]:
    """Sizes of the groups, from wide to narrow and in units, for experts of (units, how many)."""

    def cost(sizes: tuple[int, ...]) -> tuple[float, float]:
        """Units beyond what is allowed, and units with what pieces cost."""
        subsets = _subsets(sizes)
        sums = sorted(subsets)
        if sums[-1] < widest:
            return inf, inf
        chosen = [(experts, sums[bisect_left(sums, count)]) for count, experts in histogram]
        padded = sum(experts * total for experts, total in chosen)
        pieces = sum(experts * len(subsets[total]) for experts, total in chosen)
        return max(padded - allowed, 0), padded + piece * pieces

    widest = histogram[-1][0]
    every_size = range(1, widest + 1)
    best = (widest,)
    while len(best) < MAX_GROUPS:
        more, before = min(((*best, size) for size in every_size), key=cost), None
        while more != before:  # one size after the other becomes the best beside the others
            before = more
            for place in range(len(more)):
                more = min((more, *((*more[:place], size, *more[place + 1 :]) for size in every_size)), key=cost)
        (excess, total), (excess_before, total_before) = cost(more), cost(best)
        if excess == excess_before and total > (1 - WORTH_A_GROUP) * total_before:
            break
        best = more
    return tuple(sorted(best, reverse=True))


@lru_cache(maxsize=4096)
def _subsets(sizes: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """The groups that make up each sum, as few as do."""
    found: dict[int, tuple[int, ...]] = {}
    for n in range(len(sizes) + 1):
        for groups in itertools.combinations(range(len(sizes)), n):
            found.setdefault(sum(sizes[group] for group in groups), groups)
    return found
