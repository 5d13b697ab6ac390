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
    ],
)
def test_what_the_shapes_do_not_allow_is_refused(options, message):
    with pytest.raises(HeaprError, match=message):
        check_feasible(tiny_model(), HeaprConfig(**options))


def test_what_they_allow_is_not():
    check_feasible(tiny_model(), HeaprConfig(layout="uniform", ratio=0.5))
