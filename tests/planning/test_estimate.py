# Licensed under the Apache License, Version 2.0
"""The estimate of a plan against the loss of an explicit quadratic."""

import pytest
import torch

from optimum_heapr import HeaprConfig
from optimum_heapr.calibration.statistics import BlockStatistics
from optimum_heapr.criteria.obs import with_removal_curve
from optimum_heapr.planning.estimate import estimated_loss_increase
from optimum_heapr.surgery.compensation import compensate


torch.set_num_threads(1)
TOKENS, WIDTH, HIDDEN = 4000, 6, 5


def make_block(grams: bool, router_weight: float = 1.0):
    """One expert with this router weight, its activations [tokens, I], gradients [tokens, H] and `down_proj` [H, I]."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = torch.eye(WIDTH, dtype=torch.float64) + 0.3 * normal(
        WIDTH, WIDTH
    )  # far from singular: ridges are small then
    activations, gradients, weight = normal(TOKENS, WIDTH) @ mixing, normal(TOKENS, HIDDEN), normal(HIDDEN, WIDTH)
    atom_gradients = router_weight * gradients @ weight
    weighted = router_weight * activations
    block = BlockStatistics(
        activation_sq_sum=activations.square().sum(0)[None],
        gradient_sq_sum=atom_gradients.square().sum(0)[None],
        fisher_sum=(activations * atom_gradients).square().sum(0)[None],
        weight_norm=torch.ones(1, WIDTH),
        token_count=torch.tensor([TOKENS]),
        activation_gram_sum=(weighted.T @ weighted)[None] if grams else None,
        gradient_gram_sum=(atom_gradients.T @ atom_gradients)[None] if grams else None,
    )
    return block, activations, router_weight * gradients, weight


def quadratic(change, activations, gradients):
    """`1/2 E[(g . D h)^2]` for independent g and h, and a change D [H, I] of `down_proj`: every g meets every h."""
    return float(0.5 * (gradients @ change @ activations.T).square().mean())


@pytest.mark.parametrize("num_tokens", [TOKENS, 4 * TOKENS])
@pytest.mark.parametrize("router_weight", [1.0, 0.125])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_with_compensation_it_is_the_quadratic_of_what_is_left(count, router_weight, num_tokens):
    """To the few percent that the ridge and the dependence of activations on gradients, here of chance, make of it."""
    block, activations, gradients, weight = make_block(grams=True, router_weight=router_weight)
    config = HeaprConfig(compensate=True, compensation_scope="expert", criterion="obs", ridge=0.002)
    block = with_removal_curve("block", block, config.ridge)
    kept = block.removal_order[0, count:].long().sort().values
    gram = activations.T @ activations / TOKENS
    new = torch.zeros_like(weight)
    new[:, kept] = compensate(weight, gram, kept, TOKENS, config.ridge).down_proj
    expected = quadratic(new - weight, activations, gradients) * TOKENS / num_tokens
    assert estimated_loss_increase(block, [kept], num_tokens, config) == pytest.approx(expected, rel=0.05)
    block.activation_gram_sum = block.gradient_gram_sum = None  # it is a look-up
    assert estimated_loss_increase(block, [kept], num_tokens, config) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("grams", [False, True])
def test_without_it_atomic_experts_are_added_up(grams):
    block, activations, gradients, weight = make_block(grams)
    kept, alone = torch.tensor([1, 2, 3, 4]), 0.0
    for removed in (0, 5):
        change = torch.zeros_like(weight)
        change[:, removed] = -weight[:, removed]
        alone += quadratic(change, activations, gradients)
    assert estimated_loss_increase(block, [kept], TOKENS, HeaprConfig()) == pytest.approx(alone)


def test_what_is_no_beginning_of_the_curve_is_added_up_too():
    block, *_ = make_block(grams=True)
    config = HeaprConfig(compensate=True, compensation_scope="expert")
    block = with_removal_curve("block", block, config.ridge)
    order = block.removal_order[0].long()
    kept = order[[0, 2, 3, 4, 5]].sort().values  # the second to go goes first
    expected = 0.5 * block.activation_sq_sum[0, order[1]] * block.gradient_sq_sum[0, order[1]] / TOKENS**2
    assert estimated_loss_increase(block, [kept], TOKENS, config) == pytest.approx(float(expected))


def test_nothing_removed_or_nothing_measured_costs_nothing():
    block, *_ = make_block(grams=True)
    block = with_removal_curve("block", block)
    config = HeaprConfig(compensate=True, compensation_scope="expert")
    assert estimated_loss_increase(block, [torch.arange(WIDTH)], TOKENS, config) == 0
    block.token_count.zero_()
    assert estimated_loss_increase(block, [torch.tensor([0])], TOKENS, HeaprConfig()) == 0
