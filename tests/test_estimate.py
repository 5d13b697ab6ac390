# Licensed under the Apache License, Version 2.0
"""Sizes from a configuration alone: those of published models, and those that pruning really gives."""

import json

import pytest
import torch
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner
from optimum_heapr.estimate import FREE_SHARE, estimate
from optimum_heapr.evaluation.size import ModelSize
from tests.calibration.test_work import MODELS
from tests.helpers import calibration_data, tiny_model


# By published configuration: parameters that the Hub counts in the checkpoint, without layers that predict further tokens.
PUBLISHED = {
    "Qwen3-30B-A3B": (MODELS["Qwen3-30B-A3B"], 30_532_122_624),
    "Qwen3-235B-A22B": (MODELS["Qwen3-235B-A22B"], 235_093_634_560),
    "DeepSeek-V3": (DeepseekV3Config(), 671_026_419_200),
    "gpt-oss-120b": (GptOssConfig(), 116_829_156_672),
    "Mixtral-8x7B": (MixtralConfig(), 46_702_792_704),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name, tmp_path):
    config, parameters = PUBLISHED[name]
    config.save_pretrained(tmp_path)
    found = estimate(tmp_path, ratios=(0.5,), memory=2**50)
    assert found.size.parameters == pytest.approx(parameters, rel=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"], "no weights were needed"
    halved = found.pruned[0]
    assert halved.parameters == pytest.approx(parameters - found.routed_parameters / 2, rel=1e-6)
    assert found.fitting["variable"].ratio == 0, "what fits anyway loses nothing"


@pytest.mark.parametrize("layout", ["variable", "uniform"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_sizes_are_those_of_the_pruned_model(family, layout, tmp_path):
    model = tiny_model(family, dtype=torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    config = HeaprConfig(ratio=0.3, layout=layout, allocation="uniform" if layout == "uniform" else "global")
    found = estimate(tmp_path, config, ratios=(0.3,), dtype="bfloat16")
    assert found.size == ModelSize.of(model)
    expected = next(at for at in found.pruned if at.layout == layout)
    pruner = HeaprPruner(model, config=config)
    pruner.statistics = None
    pruned = pruner.apply(_plan(pruner))
    after = ModelSize.of(pruned)
    assert (expected.parameters, expected.weight_bytes) == (after.parameters, after.weight_bytes)
    assert expected.ratio == pytest.approx(pruner.applied_plan.ratio)


def _plan(pruner):
    from datasets import Dataset

    samples = [sample.tolist() for sample in calibration_data(16, 16).samples]
    return pruner.plan(pruner.calibrate(Dataset.from_dict({"input_ids": samples})))


def test_the_ratio_that_fits_is_the_least(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    before = estimate(tmp_path)
    for share in (0.99, 0.8):
        memory = int(before.size.weight_bytes * share / (1 - FREE_SHARE))
        for layout, fits in estimate(tmp_path, memory=memory).fitting.items():
            assert fits.weight_bytes <= memory * (1 - FREE_SHARE)
            smaller = estimate(tmp_path, ratios=(fits.ratio / 2,), memory=memory).pruned
            assert all(
                at.weight_bytes > memory * (1 - FREE_SHARE)
                for at in smaller
                if at.layout == layout and at.ratio < fits.ratio
            )
    assert set(estimate(tmp_path, memory=100).fitting.values()) == {None}


def test_bytes_as_stored_come_from_the_index(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    total = json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert estimate(tmp_path).stored_bytes == total


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ratios": (1.5,)}, "ratio=1.5: must be above 0 and below 1"),
        ({"tflops": 0}, "tflops=0: must be a positive number"),
        ({"bandwidth": float("inf")}, "bandwidth=inf"),
    ],
)
def test_refusals(options, expected, tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(HeaprError, match=expected):
        estimate(tmp_path, **options)
    with pytest.raises(HeaprError, match="no such folder, and no name on the Hub"):
        estimate(tmp_path / "nothing")
