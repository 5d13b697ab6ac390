# Licensed under the Apache License, Version 2.0
"""Widths that runtimes can use, and what is said when a ratio gives none."""

import pytest
import torch

from optimum_heapr.configuration import HeaprConfig
from optimum_heapr.planning.alignment import effective_multiple, padded_width
from optimum_heapr.planning.allocation import allocate
from optimum_heapr.planning.plan import PruningPlan
from optimum_heapr.utils.errors import HeaprError
from tests.helpers import random_statistics


def widths_of(width: int, experts: int = 3, **options) -> list[int]:
    scores = {"block": torch.rand(experts, width, generator=torch.Generator().manual_seed(0))}
    return [len(indices) for indices in allocate(scores, HeaprConfig(**options), {})["block"]]


@pytest.mark.parametrize(
    "options, widths, multiple",
    [
        ({}, [768], 1),
        ({"layout": "uniform"}, [768], 8),
        ({"layout": "padded"}, [768], 8),
        ({"layout": "uniform"}, [20], 1),  # grouped_mm does not run the unpruned model either
        ({"layout": "uniform", "width_multiple": 6}, [768], 24),
        ({"align_for": "vllm"}, [768], 32),
        ({"align_for": "fp8"}, [768], 128),
        ({"align_for": "gguf"}, [768], 256),
        ({"align_for": "quantization"}, [768], 128),
        ({"align_for": "vllm", "tensor_parallel": 4}, [768], 128),
        ({"tensor_parallel": 4}, [768], 4),
        ({"tensor_parallel": 4, "layout": "uniform"}, [768], 32),
        ({"align_for": "vllm", "width_multiple": 48}, [768], 96),
    ],
)
def test_effective_multiple(options, widths, multiple):
    assert effective_multiple(HeaprConfig(**options), widths) == multiple


@pytest.mark.parametrize("layout", ["variable", "uniform", "padded"])
def test_widths_keep_the_rule(layout):
    widths = widths_of(768, align_for="quantization", layout=layout, ratio=1 / 3)
    assert all(width % 128 == 0 for width in widths)
    assert sum(widths) == 3 * 512


def test_ratio_that_breaks_the_rule_names_the_nearest():
    with pytest.raises(HeaprError) as error:
        widths_of(768, align_for="quantization", layout="uniform", ratio=0.27)
    assert str(error.value) == (
        "ratio=0.27 gives width 561, not a multiple of 128 (align_for='quantization'); nearest: 512 (0.333) or 640 (0.167)"
    )


@pytest.mark.parametrize(
    "width, options, hint",
    [
        (
            1408,
            {"align_for": "gguf", "ratio": 0.25},
            r"width 1056, .* 256 .*; nearest: 1024 \(0\.273\) or 1280 \(0\.091\)$",
        ),
        (768, {"align_for": "quantization", "ratio": 0.1}, r"width 691, .* 128 .*; nearest: 640 \(0\.167\)$"),
        (768, {"align_for": "quantization", "ratio": 0.95}, r"width 38, .* 128 .*; nearest: 128 \(0\.833\)$"),
        (
            768,
            {"align_for": "quantization", "tensor_parallel": 6, "ratio": 0.5},
            r"none below the width 768; lower tensor_parallel or use align_for='none'",
        ),
        (
            32,
            {"align_for": "vllm", "ratio": 0.5},
            r"none below the width 32; use align_for='none', and a width_multiple$",
        ),
    ],
)
def test_nearest_ratios_are_possible_ones(width, options, hint):
    with pytest.raises(HeaprError, match=hint):
        widths_of(width, layout="uniform", **options)


def test_nearest_ratio_is_accepted():
    assert widths_of(768, align_for="quantization", layout="uniform", ratio=0.333) == [512] * 3


def test_width_below_the_multiple_is_refused():
    found = "asks for multiples of 512, experts of this model have 384 atomic experts; lower tensor_parallel or use align_for"
    with pytest.raises(HeaprError, match=f"^align_for='gguf', tensor_parallel=2: {found}"):
        widths_of(384, align_for="gguf", tensor_parallel=2)
    with pytest.raises(
        HeaprError, match="^align_for='fp8': asks for multiples of 128, .*experts; use align_for='none'"
    ):
        widths_of(64, align_for="fp8")  # no word of ranks that were not asked for


def test_without_a_preset_widths_are_rounded_up():
    assert widths_of(96, layout="uniform", ratio=0.3) == [72] * 3  # 67 atomic experts, as a multiple of 8
    assert widths_of(96, allocation="uniform", ratio=0.3) == [67] * 3


@pytest.mark.parametrize(
    "widest, options, width",
    [
        (500, {}, 504),
        (768, {}, 768),
        (761, {}, 768),
        (0, {}, 8),
        (500, {"align_for": "quantization"}, 512),
        (700, {"align_for": "gguf", "tensor_parallel": 2}, 1024),  # beyond the model's own width, as it was asked for
    ],
)
def test_padded_width(widest, options, width):
    assert padded_width(widest, HeaprConfig(layout="padded", **options), [768]) == width


@pytest.mark.parametrize("options", [{"align_for": "onnx"}, {"tensor_parallel": 0}])
def test_unknown_values_are_refused(options):
    with pytest.raises(HeaprError, match=next(iter(options))):
        HeaprConfig(**options)


@pytest.mark.parametrize(
    ("options", "width", "itemsize", "expected"),
    [
        (
            {"layout": "uniform", "ratio": 0.25},
            12,
            4,
            "experts of width 9, which is no multiple of 4; plan for 8 (ratio 0.333) with",
        ),
        (
            {"layout": "uniform", "ratio": 0.25},
            12,
            2,
            "experts of width 9, which is no multiple of 8; plan for 8 (ratio 0.333) with",
        ),
        (
            {"layout": "uniform", "ratio": 0.5},
            50,
            2,
            "width 25, which is no multiple of 8; plan for 24 (ratio 0.520) or 32 (ratio 0.360)",
        ),
        (
            {"layout": "uniform", "ratio": 0.5},
            6,
            2,
            "width 3, which is no multiple of 8; load the result with experts_implem",
        ),
        (
            {"layout": "padded", "allocation": "uniform", "ratio": 0.25},
            12,
            4,
            "experts of width 9, which is no multiple of 4",
        ),
        ({"layout": "uniform", "ratio": 1 / 3}, 12, 2, None),
        ({"layout": "uniform", "ratio": 0.5}, 16, 2, None),
        ({"layout": "variable", "allocation": "uniform", "ratio": 0.25}, 12, 2, None),
    ],
)
def test_a_width_that_transformers_refuses_to_run_is_said_with_those_it_takes(
    options, width, itemsize, expected, heapr_log
):
    statistics = random_statistics(width=width)
    statistics.fingerprint["storage"] = {"num_bytes": 10_000 * itemsize, "bytes_per_atomic_expert": 96 * itemsize}
    PruningPlan.build(statistics, HeaprConfig(**options)).warn_of_widths()
    said = {message for message in heapr_log.messages if "grouped_mm" in message}
    assert len(said) == (expected is not None) and all(expected in message for message in said)
