# Licensed under the Apache License, Version 2.0
"""What a model cannot have is refused before anything is spent on measuring it."""

import pytest

from optimum_heapr.configuration import HeaprConfig
from optimum_heapr.surgery.feasibility import check_feasible
from optimum_heapr.utils.errors import HeaprError
from tests.helpers import tiny_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "uniform", "ratio": 0.25, "tensor_parallel": 2}, "ratio=0.25 gives width 9, not a multiple of"),
        ({"protect": ["model.layers.7.mlp.experts"]}, "model.layers.7.mlp.experts"),
        ({"target_size": "1KB"}, "target_size='1KB': must lie between .* bytes, what is left without routed experts"),
        ({"target_parameters": 10**9}, "target_parameters=1000000000: must lie between"),
        ({"ratio": 0.5, "min_width": 11}, "ratio=0.5: min_width=11, .* leave only 0.0833 to remove"),
        ({"ratio": 0.6, "protect": ["*.0.*"]}, "ratio=0.6: .*leave only 0.5000 to remove"),
        ({"ratio": 0.5, "allocation": "uniform", "min_width": 7}, "min_width=7: ratio=0.5 leaves width 6"),
        ({"width_multiple": 13}, "width_multiple=13: must be at most 12"),
        ({"ratio": 0.01, "width_multiple": 12}, "ratio=0.01: removes less than one group of width_multiple=12"),
    ],
)
def test_what_the_shapes_do_not_allow_is_refused(options, message):
    with pytest.raises(HeaprError, match=message):
        check_feasible(tiny_model(), HeaprConfig(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "uniform", "ratio": 0.5},
        {"ratio": 0.03, "width_multiple": 8},  # the last group of an expert has 4 of its 12
        {"ratio": 0.5, "protect": ["*.0.*"], "criterion": "obs", "allocation": "layer"},
    ],
)
def test_what_they_allow_is_not(options):
    check_feasible(tiny_model(), HeaprConfig(**options))
