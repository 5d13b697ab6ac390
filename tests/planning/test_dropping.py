# Licensed under the Apache License, Version 2.0
"""Which experts go from routers: by a sum over all of their tokens, in each group as many, and a plan that says so."""

import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprError, PruningPlan
from optimum_heapr.criteria import expert_importance
from optimum_heapr.criteria.obs import removal_curves
from tests.helpers import calibration_data, random_statistics, tiny_model


PATH = "model.layers.0.mlp.experts"
ROUTING = {"experts_per_token": 2, "groups": 1, "groups_per_token": 1, "parameters": 10, "bytes": 20}


def statistics_of(**routing):
    statistics = random_statistics(experts=8, width=32)
    statistics.fingerprint["storage"]["routing"] = {**ROUTING, **routing}
    return statistics


def config_of(**options):
    return HeaprConfig(**{"layout": "uniform", "num_experts": 4, "ratio": 0.75, **options})


def test_experts_go_whose_atomic_experts_cost_least_over_all_tokens():
    statistics = statistics_of()
    for path, block in statistics.blocks.items():
        cost = 0.5 * (block.activation_sq_sum * block.gradient_sq_sum).double().sum(1) / block.token_count
        plan = PruningPlan.build(statistics, config_of())
        assert plan.dropped[path] == sorted(cost.argsort()[:4].tolist())
        assert [len(kept) for kept in plan.kept[path]] == [0 if e in plan.dropped[path] else 16 for e in range(8)]
    total = PruningPlan.build(statistics, config_of(reduction="total"))
    assert total.dropped == PruningPlan.build(statistics, config_of()).dropped


def test_obs_adds_up_its_costs_and_reap_is_as_published():
    from optimum_heapr.calibration.runner import calibrate

    statistics = calibrate(tiny_model("qwen3_moe"), calibration_data(*(24,) * 8), batch_size=8, gram=True)
    for path, block in statistics.blocks.items():
        expected = removal_curves(path, block).cost.sum(1)
        torch.testing.assert_close(expert_importance(statistics, "obs")[path], expected.double())
        reap = block.output_norm_sum / block.token_count.clamp(min=1)
        torch.testing.assert_close(expert_importance(statistics, "reap")[path], reap.double(), check_dtype=False)
        activation = block.activation_sq_sum.double().sum(1)
        torch.testing.assert_close(expert_importance(statistics, "activation")[path], activation)


def test_each_group_keeps_as_many():
    statistics = statistics_of(groups=2, groups_per_token=1)
    plan = PruningPlan.build(statistics, config_of())
    scores = expert_importance(statistics)
    for path, numbers in plan.dropped.items():
        groups = [[e for e in numbers if e // 4 == group] for group in range(2)]
        for group, gone in enumerate(groups):
            order = scores[path][4 * group : 4 * group + 4].argsort()[:2] + 4 * group
            assert gone == sorted(order.tolist())
    with pytest.raises(
        HeaprError, match="num_experts=2: the router ranks 2 groups .* 2 at least; use a multiple of 2 from 4 to 8"
    ):
        PruningPlan.build(statistics, config_of(num_experts=2))


def test_of_equal_experts_the_first_stay():
    statistics = statistics_of()
    for block in statistics.blocks.values():
        for measured in (block.activation_sq_sum, block.gradient_sq_sum, block.token_count):
            measured.fill_(1)
    assert set(map(tuple, PruningPlan.build(statistics, config_of()).dropped.values())) == {(4, 5, 6, 7)}


def test_all_experts_is_the_plan_without_the_option():
    statistics = statistics_of()
    kept = PruningPlan.build(statistics, config_of(num_experts=8)).kept
    plain = PruningPlan.build(statistics, config_of(num_experts=None))
    assert plain.dropped == {} and plain.routed[PATH] == list(range(8))
    assert all(torch.equal(*pair) for path in kept for pair in zip(kept[path], plain.kept[path]))


def test_a_saved_plan_says_what_went(tmp_path):
    plan = PruningPlan.build(statistics_of(), config_of())
    plan.save(tmp_path / "plan.safetensors")
    loaded = PruningPlan.load(tmp_path / "plan.safetensors")
    assert loaded == plan and loaded.dropped == plan.dropped != {}
    assert f"{4 * len(plan.kept)} experts go from the router" in repr(loaded)
    assert plan.routed_tokens[PATH] == [plan.tokens[PATH][expert] for expert in plan.routed[PATH]]
    assert plan.parameter_ratio == (plan.removed * 96 + 4 * 10) / 10_000


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda plan: plan.dropped[PATH].pop(), "each block must drop the same number of experts"),
        (lambda plan: plan.dropped.pop(PATH), "each block must drop the same number of experts"),
        (lambda plan: plan.dropped[PATH].reverse(), r"must rise within \[0, 8\)"),
        (lambda plan: plan.dropped[PATH].__setitem__(3, 8), r"must rise within \[0, 8\)"),
        (lambda plan: plan.kept[PATH].reverse(), "must keep an expert, and nothing of those that it drops"),
        (lambda plan: plan.storage.pop("routing"), "does not say what rows of routers go with them"),
        (
            lambda plan: setattr(plan, "config", HeaprConfig()),
            "which layout='uniform' alone can, and its layout is 'variable'; plan again",
        ),
    ],
)
def test_a_plan_that_does_not_fit_together_is_refused(spoil, message):
    plan = PruningPlan.build(statistics_of(), config_of())
    if plan.dropped[PATH] == [7 - expert for expert in reversed(plan.dropped[PATH])]:
        pytest.skip("turning it round changes nothing")
    spoil(plan)
    with pytest.raises(HeaprError, match=message):
        plan.check()


@pytest.mark.parametrize("layout", ["variable", "padded"])
def test_where_a_plan_that_drops_experts_got_another_layout_it_is_refused(layout):
    """Once it was read, as by a flag; nothing is cut."""
    plan = PruningPlan.build(statistics_of(), config_of())
    plan.config = HeaprConfig(layout=layout)
    shapes = {path: (len(experts), plan.original_width[path]) for path, experts in plan.kept.items()}
    with pytest.raises(HeaprError, match=f"drops experts from routers, .* its layout is '{layout}'; plan again"):
        plan.check_shapes(shapes)


def test_the_table_of_a_dry_run_shows_it():
    from optimum_heapr.cli.tables import plan_table

    header, _, row, *_ = plan_table(PruningPlan.build(statistics_of(), config_of())).splitlines()
    assert header.split()[:5] == ["block", "experts", "in", "router", "width"]
    assert row.split()[1:5] == ["8", "4", "32", "25.0%"]


def test_a_model_that_cannot_lose_experts_is_refused_in_its_own_words():
    statistics = statistics_of()
    statistics.fingerprint["storage"]["routing"] = {
        "refusal": "model='x': its routers are fixed; leave num_experts out"
    }
    with pytest.raises(HeaprError, match="its routers are fixed"):
        PruningPlan.build(statistics, config_of())
