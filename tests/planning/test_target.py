# Licensed under the Apache License, Version 2.0
"""A number of parameters in place of a ratio."""

import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprError, PruningPlan
from tests.helpers import random_statistics


torch.set_num_threads(1)
# 2 blocks of 4 experts of 8 atomic experts, 96 parameters each, in a model of 10,000.
ROUTED = 2 * 4 * 8 * 96


@pytest.mark.parametrize("target", [9_999, 9_900, 7_000, 10_000 - ROUTED + 96])
def test_the_most_that_is_no_more_than_asked_for(target):
    plan = PruningPlan.build(random_statistics(), HeaprConfig(ratio=0.9, target_parameters=target))
    left = 10_000 - plan.removed * 96
    assert target - 96 < left <= target
    assert PruningPlan.build(random_statistics(), plan.config).removed == plan.removed


def test_widths_that_cannot_hit_it_stay_above():
    plan = PruningPlan.build(random_statistics(), HeaprConfig(target_parameters=8_000, width_multiple=4))
    left = 10_000 - plan.removed * 96
    assert 8_000 <= left < 8_000 + 4 * 96


@pytest.mark.parametrize("target", [1, 10_000 - ROUTED, 10_000, 20_000])
def test_what_cannot_be_is_refused(target):
    with pytest.raises(HeaprError, match=f"target_parameters={target:,}.*{10_000 - ROUTED:,}.*10,000"):
        PruningPlan.build(random_statistics(), HeaprConfig(target_parameters=target))
