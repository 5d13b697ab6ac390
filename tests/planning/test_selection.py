# Licensed under the Apache License, Version 2.0
"""A threshold found by counting bits is the one that sorting finds, and a plan has its scores in memory once."""

import pytest
import torch

from optimum_heapr import HeaprConfig, PruningPlan
from optimum_heapr.planning import selection
from optimum_heapr.planning.selection import least_reaching
from tests.helpers import random_statistics
from tests.memory import LiveBytes


def by_sorting(parts, amount):
    """One value after another in rising order, until the weights make the amount."""
    flat = [
        (value, 1 if weights is None else weights[place])
        for values, weights in ((values.double().tolist(), weights) for values, weights in parts)
        for row in values
        for place, value in enumerate(row)
    ]
    gone = 0
    for value, weight in sorted(flat):
        gone += int(weight)
        if gone >= amount:
            return value, sum(int(weight) for other, weight in flat if other < value)


EDGES = [0.0, -0.0, 5e-324, -5e-324, 1e-308, 1.0, -1.0, 1 + 2**-52, 1 - 2**-53, 1e308, -1e308, float("inf"), -0.7]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "ties", "tiny", "edges"])
def test_it_is_the_value_that_sorting_finds(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    values = {
        "random": torch.randn(6, 20, generator=generator),
        "ties": torch.randint(-2, 2, (6, 20), generator=generator).float(),
        "tiny": torch.randn(6, 20, generator=generator, dtype=torch.float64) * 1e-300,
        "edges": torch.tensor(EDGES * 8, dtype=torch.float64)[:100].view(5, 20),
    }[kind].to(dtype)
    sizes = torch.tensor([3] * 19 + [1])
    for parts in ([(values[:2], None), (values[2:], None)], [(values[:3], sizes), (values[3:], 2 * sizes)]):
        total = sum(part.numel() if weights is None else len(part) * int(weights.sum()) for part, weights in parts)
        for amount in {1, 2, 7, total // 3, total // 2, total - 1, total}:
            assert least_reaching(lambda parts=parts: parts, amount) == by_sorting(parts, amount)


@pytest.mark.parametrize("options", [{}, {"width_multiple": 16}], ids=str)
def test_a_plan_has_its_scores_in_memory_once(options, monkeypatch):
    """Half as much again is for what it is made of besides: which stay, an order of those within groups, the last block's sums."""
    monkeypatch.setattr(selection, "_BITS", 8)  # as small a part of it all as the table is of a large model
    statistics = random_statistics(32, 64, 64)
    scores = 8 * 32 * 64 * 64
    with LiveBytes() as watched:
        PruningPlan.build(statistics, HeaprConfig(ratio=0.5, **options))
    assert scores < watched.most < 1.5 * scores
