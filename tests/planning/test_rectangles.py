# Licensed under the Apache License, Version 2.0
"""What `num_experts="auto"` chooses from: rectangles of one size, none larger than the layout has with all experts."""

import pytest

from optimum_heapr import HeaprConfig, HeaprError, PruningPlan
from optimum_heapr.planning.rectangles import rectangles
from tests.helpers import random_statistics


def statistics_of(experts=32, width=96, **routing):
    statistics = random_statistics(experts=experts, width=width)
    plain = {"experts_per_token": 4, "groups": 1, "groups_per_token": 1, "parameters": 10, "bytes": 20}
    statistics.fingerprint["storage"]["routing"] = {**plain, **routing}
    return statistics


def config_of(**options):
    fitted = {"compensate": True, "compensation_scope": "block"}
    return HeaprConfig(**{"layout": "uniform", "num_experts": "auto", "ratio": 0.5, **fitted, **options})


def test_they_reach_from_all_experts_to_whole_experts():
    found = rectangles(statistics_of(), config_of())
    assert list(found) == [(32, 48), (27, 56), (24, 64), (21, 72), (19, 80), (16, 96)]
    for (experts, width), config in found.items():
        plan = PruningPlan.build(statistics_of(), config)
        assert set(map(tuple, plan.routed_widths.values())) == {(width,) * experts}
        assert experts * width <= 32 * 48 < (experts + 1) * width


def test_none_is_larger_than_the_layout_with_all_experts():
    for ratio in (0.1, 0.3, 0.7, 0.9):
        with_all = PruningPlan.build(statistics_of(), config_of(ratio=ratio, num_experts=None))
        room = 32 * with_all.widths["model.layers.0.mlp.experts"][0]
        found = rectangles(statistics_of(), config_of(ratio=ratio))
        assert next(iter(found))[0] == 32 and all(experts * width <= room for experts, width in found)
        assert all(experts >= 4 and width <= 96 and width % 8 == 0 for experts, width in found)


def test_targets_and_multiples_of_runtimes_are_kept():
    statistics = statistics_of()
    statistics.fingerprint["model"]["num_parameters"] = 2 * 32 * 96 * 96 + 5_000
    found = rectangles(statistics, config_of(ratio=None, target_parameters=2 * 32 * 50 * 96 + 5_000))
    assert list(found)[:2] == [(32, 48), (28, 56)] and all(experts * width <= 32 * 50 for experts, width in found)
    found = rectangles(statistics_of(width=512), config_of(align_for="quantization"))
    assert list(found) == [(32, 256), (21, 384), (16, 512)]


def test_groups_and_what_a_token_gets_bound_the_number():
    found = rectangles(statistics_of(groups=4, groups_per_token=2), config_of())
    assert list(found) == [(32, 48), (24, 64), (20, 72), (16, 96)]
    assert min(experts for experts, _ in rectangles(statistics_of(experts_per_token=20), config_of())) == 21


def test_it_is_chosen_with_the_model_and_the_scope_that_fits():
    with pytest.raises(
        HeaprError, match="num_experts='auto': is measured with the model and the text, which HeaprPruner.plan"
    ):
        PruningPlan.build(statistics_of(), config_of())
    for options in ({"compensation_scope": "expert"}, {"ratio": None, "max_loss_increase": 0.1}):
        with pytest.raises(
            HeaprError, match="num_experts='auto': needs compensation_scope='block', and no max_loss_increase"
        ):
            config_of(**options)
