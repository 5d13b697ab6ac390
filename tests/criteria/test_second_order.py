# Licensed under the Apache License, Version 2.0
"""Scores against formulas written out, and the removal order of `obs` through allocation."""

import pytest
import torch

from optimum_heapr import AtomicStatistics, HeaprConfig, HeaprError, PruningPlan
from optimum_heapr.calibration.statistics import BlockStatistics
from optimum_heapr.criteria import importance, obs
from optimum_heapr.criteria.elimination import greedy_elimination, ridge_for_tokens
from optimum_heapr.criteria.obs import (
    TOKEN_DEPENDENCE,
    removal_curves,
    scores_of_order,
    store_removal_curves,
    token_dependence,
)


EXPERTS, WIDTH = 4, 10
ROUNDED = 3 * torch.finfo(torch.float32).eps  # three roundings and more


def block_statistics(counts=(60, 25, 0, 7), seed=0) -> BlockStatistics:
    """Statistics of explicit activations and gradients; the third expert was not reached."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for count in counts:
        mixing = torch.randn(WIDTH, WIDTH, generator=generator)
        h = torch.randn(count, WIDTH, generator=generator) @ mixing
        g = torch.randn(count, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
        parts.append((h.square().sum(0), g.square().sum(0), (h * g).square().sum(0), h.T @ h, g.T @ g))
    h2, g2, fisher, activation_gram, gradient_gram = map(torch.stack, zip(*parts))
    return BlockStatistics(
        activation_sq_sum=h2,
        gradient_sq_sum=g2,
        fisher_sum=fisher,
        weight_norm=torch.rand(EXPERTS, WIDTH, generator=generator) + 0.5,
        token_count=torch.tensor(counts),
        output_norm_sum=torch.rand(EXPERTS, generator=generator) * torch.tensor(counts),
        activation_gram_sum=activation_gram,
        gradient_gram_sum=gradient_gram,
    )


@pytest.fixture
def statistics() -> AtomicStatistics:
    model = {"parameters_per_atomic_expert": 48, "num_parameters": 10_000}
    blocks = {f"layers.{seed}": block_statistics(seed=seed) for seed in range(2)}
    return AtomicStatistics(blocks, {"data": {"num_tokens": 46}, "model": model})


def test_reductions_differ_by_the_tokens_of_the_expert(statistics):
    for criterion in ("heapr", "fisher"):
        mean, total = (importance(statistics, criterion, reduction=reduction) for reduction in ("mean", "total"))
        for path, block in statistics.blocks.items():
            reached = block.reached
            expected = mean[path][reached] * block.token_count[reached, None]
            # Measured in float32: the mean, half of it, and the product with the tokens are rounded to that.
            torch.testing.assert_close(total[path][reached], expected, rtol=ROUNDED, atol=0)
            assert (total[path][~reached] < 0).all()
    block = statistics.blocks["layers.0"]
    product = block.activation_sq_sum[1].double() * block.gradient_sq_sum[1].double() / 25**2 / 2
    torch.testing.assert_close(importance(statistics, "heapr")["layers.0"][1], product, rtol=ROUNDED, atol=0)


def test_scores_of_order_sort_into_the_order_whatever_the_cost():
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(50, generator=generator) for _ in range(6)])
    cost = torch.rand(6, 50, generator=generator)
    cost[1] = 0
    cost[2] = 3.0  # all equal
    cost[3] = torch.arange(50).flip(0) * 1e-30  # falling: the running maximum is constant
    cost[4, ::2] = 1e30
    cost[5] = 1e-42  # not a normal number in float32
    scores = scores_of_order(order, cost)
    assert torch.equal(scores.sort(dim=1).indices, order)
    assert (scores.gather(1, order).diff(dim=1) > 0).all()
    rising = cost.cummax(dim=1).values.double()
    torch.testing.assert_close(scores.gather(1, order)[:5], rising[:5], rtol=1e-12, atol=1e-300)


def test_obs_is_the_elimination_of_each_expert(statistics):
    block = statistics.blocks["layers.1"]
    scores = importance(statistics, "obs")["layers.1"]
    for expert, tokens in enumerate((60, 25, 0, 7)):
        if not tokens:
            assert (scores[expert] < 0).all()
            continue
        ridge = ridge_for_tokens(0.01, WIDTH, tokens)
        apart = block.activation_sq_sum[expert] * block.gradient_sq_sum[expert] / tokens
        scale = (block.fisher_sum[expert] / apart) ** (TOKEN_DEPENDENCE / 2)
        gradient_gram = scale[:, None] * block.gradient_gram_sum[expert] * scale / tokens
        alone = greedy_elimination(block.activation_gram_sum[[expert]] / tokens, gradient_gram[None], ridge)
        assert torch.equal(scores[expert].sort().indices, alone.order[0])
        total = scores[expert].sort().values[-1]
        expected = alone.monotone_cost[0, -1].double() * tokens / (1 + ridge)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ratio", [0.2, 0.45, 0.7])
@pytest.mark.parametrize("allocation", ["global", "layer", "uniform"])
def test_obs_plans_remove_a_beginning_of_the_order(statistics, ratio, allocation):
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=ratio, criterion="obs", allocation=allocation))
    for path, experts in plan.kept.items():
        order = removal_curves(path, statistics.blocks[path]).order
        for expert, kept in enumerate(experts):
            if statistics.blocks[path].reached[expert]:
                assert torch.equal(kept, order[expert, WIDTH - len(kept) :].sort().values)


def test_obs_does_not_depend_on_the_unit_of_the_gradient(statistics):
    before = importance(statistics, "obs")
    for block in statistics.blocks.values():
        for total in (block.gradient_gram_sum, block.gradient_sq_sum, block.fisher_sum):
            total *= 2.0**-40
    for path, scores in importance(statistics, "obs").items():
        assert torch.equal(scores.argsort(dim=1), before[path].argsort(dim=1))


def test_token_dependence_is_one_where_nothing_is_known(statistics):
    block = statistics.blocks["layers.0"]
    block.activation_sq_sum[0, 3] = block.fisher_sum[0, 3] = 0
    dependence = token_dependence(block)
    assert (dependence[2] == 1).all() and dependence[0, 3] == 1
    expected = 60 * block.fisher_sum[0, 1] / (block.activation_sq_sum[0, 1] * block.gradient_sq_sum[0, 1])
    torch.testing.assert_close(dependence[0, 1], expected)


@pytest.mark.parametrize("criterion", ["reap", "frequency"])
def test_expert_level_baselines_take_whole_experts(statistics, criterion):
    scores = importance(statistics, criterion)
    for path, block in statistics.blocks.items():
        counts = block.token_count.clamp(min=1)
        expected = block.token_count if criterion == "frequency" else block.output_norm_sum / counts
        torch.testing.assert_close(scores[path].double(), expected.double()[:, None].expand(-1, WIDTH))
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=0.4, criterion=criterion, allocation="layer"))
    for path, widths in plan.widths.items():
        assert sorted(widths) == [0, 4, 10, 10]  # 16 of 40: one expert, and a part of the next
        assert widths[2] == 0  # the one that nothing was routed to
        kept = plan.kept[path][widths.index(4)]
        assert torch.equal(kept, torch.arange(4))


def test_reap_without_its_statistic_is_refused(statistics):
    statistics.blocks["layers.0"].output_norm_sum = None
    with pytest.raises(HeaprError, match="criterion='reap'.*layers.0.*calibrate again"):
        importance(statistics, "reap")


# Stored removal curves


@pytest.mark.parametrize("allocation", ["global", "layer", "uniform"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_plans_from_stored_curves_are_the_same(statistics, tmp_path, monkeypatch, ratio, allocation):
    config = HeaprConfig(ratio=ratio, criterion="obs", allocation=allocation)
    expected = PruningPlan.build(statistics, config)
    store_removal_curves(statistics)
    statistics.save(tmp_path / "all.safetensors")
    statistics.save(tmp_path / "curves.safetensors", grams=False)
    monkeypatch.setattr(obs, "greedy_elimination", None)  # nothing is computed anew
    for name in ("all", "curves"):
        loaded = AtomicStatistics.load(tmp_path / f"{name}.safetensors")
        assert all(block.has_curves and block.has_grams == (name == "all") for block in loaded.blocks.values())
        plan = PruningPlan.build(loaded, config)
        for path, experts in expected.kept.items():
            assert all(map(torch.equal, plan.kept[path], experts))
        if name == "all":
            assert plan.loss_increase == expected.loss_increase
    assert (tmp_path / "curves.safetensors").stat().st_size < (tmp_path / "all.safetensors").stat().st_size


def test_curves_serve_the_ridge_that_they_were_computed_with(statistics):
    store_removal_curves(statistics, 0.5)
    block = statistics.blocks["layers.0"]
    # An expert with few tokens has more than was asked for; so has one with none.
    torch.testing.assert_close(block.removal_ridge, torch.tensor([0.5, 0.5, 10.0, 10 / 7]))
    computed = removal_curves("layers.0", block_statistics(), 0.01)
    assert torch.equal(removal_curves("layers.0", block, 0.01).cost, computed.cost)  # anew: the matrices are there
    stored = removal_curves("layers.0", block_statistics(), 0.5)
    block.activation_gram_sum = block.gradient_gram_sum = None
    again = removal_curves("layers.0", block, 0.5)
    assert torch.equal(again.cost, stored.cost) and torch.equal(again.order, stored.order)
    with pytest.raises(HeaprError, match="ridge=0.01: the removal curves of layers.0 .*least of them 0.5.*calibrate"):
        removal_curves("layers.0", block, 0.01)
    store_removal_curves(AtomicStatistics({"layers.0": block}), 0.5)
    assert torch.equal(block.removal_cost, stored.cost)


def test_without_matrices_compensation_is_refused_and_other_criteria_are_not(statistics, tmp_path):
    store_removal_curves(statistics)
    statistics.save(tmp_path / "curves.safetensors", grams=False)
    loaded = AtomicStatistics.load(tmp_path / "curves.safetensors")
    for path, block in loaded.blocks.items():
        with pytest.raises(HeaprError, match="compensate=True: needs second-order statistics"):
            block.check_grams(path, "compensate=True")
        assert torch.equal(importance(statistics, "fisher")[path], importance(loaded, "fisher")[path])


def test_an_order_that_is_none_is_refused(statistics, tmp_path):
    store_removal_curves(statistics)
    statistics.blocks["layers.1"].removal_order[2, 3] = 99
    statistics.save(tmp_path / "statistics.safetensors")
    with pytest.raises(HeaprError, match="layers.1.removal_order must name each of 10 atomic experts once"):
        AtomicStatistics.load(tmp_path / "statistics.safetensors")
