# Licensed under the Apache License, Version 2.0
"""The worst of several sources, by formulas of their own, and what cannot be ranked by it."""

import dataclasses

import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprError
from optimum_heapr.configuration import BY_SOURCE, CRITERIA
from optimum_heapr.criteria import expert_importance, importance
from optimum_heapr.planning.estimate import increase_by_source
from optimum_heapr.planning.plan import PruningPlan
from tests.helpers import random_statistics


SOURCES = 3


@pytest.fixture
def statistics():
    return random_statistics(sources=SOURCES, unreached={1: [2]})


def means(block, source, name):
    return getattr(block, f"source_{name}")[:, source].double() / block.source_token_count[:, source].clamp(
        min=1
    ).unsqueeze(1)


FORMULAS = {
    "heapr": lambda block, s: 0.5 * means(block, s, "activation_sq_sum") * means(block, s, "gradient_sq_sum"),
    "fisher": lambda block, s: 0.5 * means(block, s, "fisher_sum"),
    "activation": lambda block, s: means(block, s, "activation_sq_sum"),
    "reap": lambda block, s: (block.source_output_norm_sum[:, s] / block.source_token_count[:, s].clamp(min=1))[
        :, None
    ].expand(-1, block.width),
}


@pytest.mark.parametrize("reduction", ["mean", "total"])
@pytest.mark.parametrize("criterion", BY_SOURCE)
def test_it_is_the_largest_of_the_scores_of_the_sources(criterion, reduction, statistics):
    found = importance(statistics, criterion, reduction=reduction, over_sources="max")
    weighs = reduction == "total" and criterion in ("heapr", "fisher")
    for path, block in statistics.blocks.items():
        scores = [FORMULAS[criterion](block, source) for source in range(SOURCES)]
        if weighs:  # 300 tokens in all, 100 of each
            scores = [3 * block.source_token_count[:, source, None] * score for source, score in enumerate(scores)]
        expected = torch.stack(scores).amax(0).double()
        reached = block.reached
        torch.testing.assert_close(found[path][reached].double(), expected[reached], rtol=1e-6, atol=0)
        if criterion != "reap":
            assert (found[path][~reached] < 0).all()  # ranked among themselves, below all others
    assert not torch.equal(found[path], importance(statistics, criterion, reduction=reduction)[path])


@pytest.mark.parametrize("criterion", BY_SOURCE)
def test_whole_experts_count_by_the_source_that_needs_them_most(criterion, statistics):
    found = expert_importance(statistics, criterion, over_sources="max")
    for path, block in statistics.blocks.items():
        scores = [FORMULAS[criterion](block, source) for source in range(SOURCES)]
        if criterion == "reap":  # a mean over the tokens of the expert
            scores = [score[:, 0] for score in scores]
        else:
            scores = [3 * block.source_token_count[:, s] * score.sum(1) for s, score in enumerate(scores)]
        torch.testing.assert_close(found[path], torch.stack(scores).amax(0).double(), rtol=1e-5, atol=0)


def test_sources_that_are_alike_rank_as_their_mean(statistics):
    for block in statistics.blocks.values():
        for name in ("activation_sq_sum", "gradient_sq_sum", "fisher_sum", "output_norm_sum", "token_count"):
            total = getattr(block, name)
            setattr(block, f"source_{name}", torch.stack([total] * SOURCES, dim=1))
            setattr(block, name, SOURCES * total)
    for criterion in BY_SOURCE:
        worst, mean = (importance(statistics, criterion, over_sources=over) for over in ("max", "mean"))
        for path, scores in mean.items():
            torch.testing.assert_close(worst[path].double(), scores.double(), rtol=1e-5, atol=0)


def test_a_plan_by_the_worst_source_spares_it(statistics):
    """What goes costs the source that loses most less than what goes by the mean."""
    plans = {
        over: PruningPlan.build(statistics, HeaprConfig(ratio=0.4, reduction_over_sources=over, reduction="total"))
        for over in ("mean", "max")
    }
    worst = {over: max(source["increase"] for source in plan.sources) for over, plan in plans.items()}
    assert worst["max"] < worst["mean"]


def test_what_each_source_loses_is_said_by_the_plan(statistics, tmp_path):
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=0.4))
    assert [source["name"] for source in plan.sources] == ["text 0", "text 1", "text 2"]
    for number, source in enumerate(plan.sources):
        expected = 0.0
        for path, block in statistics.blocks.items():
            for expert, kept in enumerate(plan.kept[path]):
                gone = [atom for atom in range(block.width) if atom not in kept.tolist()]
                count = int(block.source_token_count[expert, number])
                of_h, of_g = (
                    getattr(block, f"source_{name}")[expert, number, gone].double()
                    for name in ("activation_sq_sum", "gradient_sq_sum")
                )
                expected += float((0.5 * of_h * of_g).sum()) / max(count, 1) / 100
        assert source["increase"] == pytest.approx(expected, rel=1e-6)
    plan.save(tmp_path / "plan")
    assert PruningPlan.load(tmp_path / "plan") == plan
    one = random_statistics(sources=1)
    assert PruningPlan.build(one, HeaprConfig(ratio=0.4)).sources == []
    assert PruningPlan.build(random_statistics(), HeaprConfig(ratio=0.4)).sources == []


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in BY_SOURCE])
def test_criteria_that_are_not_measured_by_source_are_refused(criterion):
    with pytest.raises(
        HeaprError,
        match=rf"criterion='{criterion}': reduction_over_sources='max' needs one of \('heapr', ",
    ):
        HeaprConfig(criterion=criterion, reduction_over_sources="max")


def test_statistics_without_sources_are_refused(statistics):
    block = next(iter(statistics.blocks.values()))
    with pytest.raises(HeaprError, match="'max': the calibration text is one source; name a mixture"):
        importance(random_statistics(sources=1), over_sources="max")
    for name in [part.name for part in dataclasses.fields(block) if part.name.startswith("source_")]:
        setattr(block, name, None)
    with pytest.raises(HeaprError, match="'max': the statistics have no sums by source.*calibrate again"):
        importance(statistics, over_sources="max")
    assert increase_by_source(statistics, PruningPlan.build(statistics, HeaprConfig()).kept) == []
