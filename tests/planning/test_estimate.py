# Licensed under the Apache License, Version 2.0
"""The estimate of a plan against the loss of an explicit quadratic."""

import pytest
import torch

from optimum_heapr import HeaprConfig
from optimum_heapr.calibration.statistics import BlockStatistics
from optimum_heapr.planning.estimate import estimated_loss_increase
from optimum_heapr.surgery.compensation import compensate


TOKENS, WIDTH, HIDDEN = 400, 6, 5


def make_block(grams: bool):
    """One expert whose router weight is 1, its activations [tokens, I], gradients [tokens, H] and `down_proj` [H, I]."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    activations, gradients, weight = normal(TOKENS, WIDTH) @ normal(WIDTH, WIDTH), normal(TOKENS, HIDDEN), normal(5, 6)
    atom_gradients = gradients @ weight
    block = BlockStatistics(
        activation_sq_sum=activations.square().sum(0)[None],
        gradient_sq_sum=atom_gradients.square().sum(0)[None],
        fisher_sum=(activations * atom_gradients).square().sum(0)[None],
        weight_norm=torch.ones(1, WIDTH),
        token_count=torch.tensor([TOKENS]),
        activation_gram_sum=(activations.T @ activations)[None] if grams else None,
        gradient_gram_sum=(atom_gradients.T @ atom_gradients)[None] if grams else None,
    )
    return block, activations, gradients, weight


def quadratic(change, activations, gradients):
    """`1/2 E[(g . D h)^2]` for independent g and h, and a change D [H, I] of `down_proj`: every g meets every h."""
    return float(0.5 * (gradients @ change @ activations.T).square().mean())


@pytest.mark.parametrize("num_tokens", [TOKENS, 4 * TOKENS])
@pytest.mark.parametrize("compensated", [False, True])
def test_equal_to_the_quadratic(compensated, num_tokens):
    block, activations, gradients, weight = make_block(grams=True)
    kept = torch.tensor([0, 2, 5])
    new = torch.zeros_like(weight)
    gram = activations.T @ activations / TOKENS
    new[:, kept] = compensate(weight, gram, kept, TOKENS, 0.05).down_proj if compensated else weight[:, kept]
    config = HeaprConfig(compensate=compensated, ridge=0.05)
    expected = quadratic(new - weight, activations, gradients) * TOKENS / num_tokens
    assert estimated_loss_increase(block, [kept], num_tokens, config) == pytest.approx(expected, rel=1e-6)


def test_vectors_add_up_atomic_experts():
    block, activations, gradients, weight = make_block(grams=False)
    kept, alone = torch.tensor([1, 2, 3, 4]), 0.0
    for removed in (0, 5):
        change = torch.zeros_like(weight)
        change[:, removed] = -weight[:, removed]
        alone += quadratic(change, activations, gradients)
    assert estimated_loss_increase(block, [kept], TOKENS, HeaprConfig()) == pytest.approx(alone)


def test_nothing_removed_or_nothing_measured_costs_nothing():
    block, *_ = make_block(grams=True)
    assert estimated_loss_increase(block, [torch.arange(WIDTH)], TOKENS, HeaprConfig(compensate=True)) == 0
    block.token_count.zero_()
    assert estimated_loss_increase(block, [torch.tensor([0])], TOKENS, HeaprConfig()) == 0
