# Licensed under the Apache License, Version 2.0
"""The perplexity metric against direct computation."""

import math
import statistics

import pytest
import torch

from optimum_heapr.evaluation.metric import TokenPerplexity


def test_perplexity_is_that_of_all_tokens_together():
    """Not the mean of the samples' perplexities, nor of their losses: a long sample weighs more."""
    result = TokenPerplexity().compute(predictions=[10.0, 90.0], references=[10, 30])
    assert result["num_tokens"] == 40
    assert math.isclose(result["loss"], 100 / 40)
    assert math.isclose(result["perplexity"], math.exp(2.5))


def test_for_samples_of_equal_length_the_error_is_that_of_a_mean():
    losses = [20.0, 22.0, 27.0, 19.5, 24.0]
    result = TokenPerplexity().compute(predictions=losses, references=[10] * 5)
    expected = statistics.stdev(loss / 10 for loss in losses) / math.sqrt(5)
    assert math.isclose(result["loss_standard_error"], expected, rel_tol=1e-12)


def test_for_samples_of_different_length_the_error_is_the_spread_of_the_ratio():
    """Against the spread of the loss over many draws of samples from one population."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 100, (4000, 40), generator=generator)
    losses = (2 + torch.rand(4000, 40, generator=generator, dtype=torch.float64)) * counts
    spread = (losses.sum(1) / counts.sum(1)).std().item()
    estimates = [
        TokenPerplexity._compute(None, row.tolist(), count.tolist())["loss_standard_error"]
        for row, count in zip(losses[:200], counts[:200])
    ]
    assert math.isclose(statistics.mean(estimates), spread, rel_tol=0.05)


def test_one_sample_has_no_error():
    result = TokenPerplexity().compute(predictions=[7.0], references=[2])
    assert result == {
        "perplexity": math.exp(3.5),
        "loss": 3.5,
        "loss_standard_error": 0.0,
        "num_tokens": 2,
    }


def test_equal_samples_have_no_error():
    assert TokenPerplexity().compute(predictions=[7.0, 14.0], references=[2, 4])["loss_standard_error"] == 0


def test_an_enormous_loss_is_no_overflow():
    assert math.isfinite(TokenPerplexity().compute(predictions=[1e6], references=[1])["perplexity"])


def test_batches_can_be_added_one_after_another():
    metric = TokenPerplexity()
    metric.add_batch(predictions=[1.0, 2.0], references=[1, 2])
    metric.add(prediction=3.0, reference=4)
    assert metric.compute()["loss"] == pytest.approx(6 / 7)
