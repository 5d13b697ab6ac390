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
@pytest.mark.parametrize("model", ["demo", "moe-a"])
def test_half_precision_gives_the_ranking_of_float32(model):
    text = "demo"
    if model != "demo":
        folder = shared_folder()
        model, text = str(folder / "models" / model), str(folder / "data" / "calibration.jsonl")
    # With half the samples the correlation is .998: what one or two tokens say of an expert carries all of their rounding.
    config = HeaprConfig(dataset=text, num_samples=16, seq_length=256, batch_size=4)
    measured = {
        dtype: HeaprPruner.from_pretrained(model, config, dtype=dtype).calibrate()
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    for criterion in ("heapr", "fisher"):
        scores = {dtype: importance(statistics, criterion) for dtype, statistics in measured.items()}
        # Experts that no token reached are ranked by the norm of their weights, which would agree in any case.
        reached = {path: block.reached for path, block in measured[torch.float32].blocks.items()}
        flat = {
            dtype: torch.cat([values[reached[path]].flatten() for path, values in blocks.items()])
            for dtype, blocks in scores.items()
        }
        assert not torch.equal(flat[torch.float16], flat[torch.float32])
        assert rank_correlation(flat[torch.bfloat16], flat[torch.float32]) >= 0.999
        assert rank_correlation(flat[torch.float16], flat[torch.float32]) >= 0.9999
