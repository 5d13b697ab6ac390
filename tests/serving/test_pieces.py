# Licensed under the Apache License, Version 2.0
"""Experts of many widths as pieces of a few: nothing is lost, and few groups cost few zeros."""

import itertools
import random
from math import ceil

import pytest

from optimum_heapr.serving.pieces import COLUMNS_A_PIECE, MAX_GROUPS, MAX_PADDING, Pieces, cut


def random_widths(experts: int, widest: int, shape: float = 1.0, seed: int = 0) -> list[int]:
    """As global plans have them: everything between nothing and the full width."""
    generator = random.Random(seed)
    return [int(widest * generator.betavariate(1, shape)) for _ in range(experts - 1)] + [widest]


@pytest.mark.parametrize("multiple", [32, 64])
@pytest.mark.parametrize("widest", [96, 512, 768, 1408])
def test_every_atomic_expert_is_in_one_piece(widest, multiple):
    widths = [0, *random_widths(31, widest)]
    pieces = cut(widths, multiple)
    for expert, width in enumerate(widths):
        covered = [
            atom for group, start in pieces.starts(expert) for atom in range(start, start + pieces.widths[group])
        ]
        assert covered == list(range(len(covered))), "pieces follow one another"
        assert width <= len(covered)
        # No piece is zeros alone, and a token never needs two pieces of one group.
        assert all(start < width for _, start in pieces.starts(expert))
        assert len(set(pieces.groups_of[expert])) == len(pieces.groups_of[expert])
    assert all(width % multiple == 0 for width in pieces.widths)
    assert list(pieces.widths) == sorted(pieces.widths, reverse=True)
    for group in range(len(pieces.widths)):
        assert pieces.experts_of(group) == [e for e, groups in enumerate(pieces.groups_of) if group in groups] != []


@pytest.mark.parametrize(
    ("experts", "widest", "shape"),
    [(64, 512, 1.0), (128, 768, 1.0), (64, 1408, 1.0), (8, 14336, 1.0), (128, 2880, 2.0)],
)
def test_padding_is_at_most_what_is_promised(experts, widest, shape):
    widths = random_widths(experts, widest, shape)
    pieces = cut(widths, 32)
    assert len(pieces.widths) <= MAX_GROUPS
    assert pieces.padded_width <= (1 + MAX_PADDING) * sum(widths)


def test_narrow_experts_are_padded_to_the_multiple_and_no_further():
    widths = random_widths(32, 96)
    assert cut(widths, 32).padded_width == sum(32 * ceil(width / 32) for width in widths)


def test_equal_widths_are_one_group_without_zeros():
    assert cut([64] * 8, 32) == Pieces((64,), ((0,),) * 8)


def test_as_few_groups_as_keep_the_promise():
    # One group of 320 pads by 11 %, and two, 320 and 256, by nothing.
    assert cut([320, 256, 256, 320, 256, 320], 32).widths == (320, 256)
    assert cut([320, 300, 320, 310], 32).widths == (320,)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_of_as_many_groups_costs_much_less(seed):
    """Against all: one size is chosen after the other, which misses 3 % at most."""

    def cost(sizes):
        """Columns of all experts and what their pieces cost, or nothing where that is more memory than is allowed."""
        pieces = {}
        for n in range(len(sizes) + 1):
            for part in itertools.combinations(sizes, n):
                pieces.setdefault(32 * sum(part), n)
        if max(pieces) < max(widths):
            return None
        chosen = [min(total for total in pieces if total >= width) for width in widths]
        if sum(chosen) > max((1 + MAX_PADDING) * sum(widths), sum(32 * ceil(width / 32) for width in widths)):
            return None
        return sum(chosen) + COLUMNS_A_PIECE * sum(pieces[total] for total in chosen)

    widths = random_widths(12, 256, seed=seed)
    found = cut(widths, 32)
    ours = cost([width // 32 for width in found.widths])
    assert ours == found.padded_width + COLUMNS_A_PIECE * sum(map(len, found.groups_of))
    every = itertools.combinations_with_replacement(range(1, 9), len(found.widths))
    assert ours <= 1.03 * min(filter(None, map(cost, every)))


def test_experts_have_few_pieces():
    """Powers of two pad as little, and take half a piece more an expert."""
    widths = random_widths(64, 512)
    pieces = cut(widths, 32)
    assert sum(map(len, pieces.groups_of)) / sum(map(bool, widths)) < 1.75
    powers = [bin(ceil(width / 32)).count("1") for width in widths]
    assert sum(map(len, pieces.groups_of)) < 0.8 * sum(powers)


def test_an_expert_without_atomic_experts_has_a_piece_where_a_bias_is_left_of_it():
    assert cut([0, 64], 32).groups_of[0] == ()
    assert len(cut([0, 64], 32, keep_empty=True).groups_of[0]) == 1


def test_a_layer_without_atomic_experts_has_one_piece_of_zeros():
    assert cut([0, 0, 0], 32) == Pieces((32,), ((0,), (), ()))
