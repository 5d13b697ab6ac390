# Licensed under the Apache License, Version 2.0
"""Models loaded in half precision give the ranking of float32: on trained models, by Spearman's correlation."""

import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.criteria import importance
from tests.helpers import shared_folder


def ranks(scores):
    return scores.argsort().argsort().double()


def rank_correlation(first, second):
    return torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1].item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "least"),
    [("demo", {torch.bfloat16: 0.999, torch.float16: 0.9995}), ("moe-a", {torch.bfloat16: 0.999})],
    ids=["demo", "moe-a"],
)
def test_half_precision_gives_the_ranking_of_float32(model, least):
    text = "demo"
    if model != "demo":
        folder = shared_folder()
        model, text = str(folder / "models" / model), str(folder / "data" / "calibration.jsonl")
    config = HeaprConfig(dataset=text, num_samples=8 if text == "demo" else 4, seq_length=256, batch_size=4)
    measured = {
        dtype: HeaprPruner.from_pretrained(model, config, dtype=dtype).calibrate() for dtype in (torch.float32, *least)
    }
    for criterion in ("heapr", "fisher"):
        scores = {dtype: importance(statistics, criterion) for dtype, statistics in measured.items()}
        # What a few tokens say of an expert carries all of their rounding; of no tokens, nothing was measured.
        reached = {path: block.token_count >= 64 for path, block in measured[torch.float32].blocks.items()}
        flat = {
            dtype: torch.cat([values[reached[path]].flatten() for path, values in blocks.items()])
            for dtype, blocks in scores.items()
        }
        for dtype, correlation in least.items():
            assert not torch.equal(flat[dtype], flat[torch.float32])
            assert rank_correlation(flat[dtype], flat[torch.float32]) >= correlation
