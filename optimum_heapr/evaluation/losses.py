# Licensed under the Apache License, Version 2.0
"""Losses of samples as one number, with its error. Imports nothing, as everything that reports a loss needs it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_with_error(totals: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Mean over tokens of what was summed over samples, and its standard error: that of a ratio of two sums over samples.

    Of the differences between two models on the same samples it gives the error of the difference, which is much smaller
    than the errors of the two losses: hard samples are hard for both.
    """
    tokens, samples = sum(counts), len(counts)
    mean = math.fsum(totals) / tokens
    squares = math.fsum((total - mean * count) ** 2 for total, count in zip(totals, counts))
    return mean, math.sqrt(squares * samples / (samples - 1)) / tokens if samples > 1 else 0.0


def perplexity(totals: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """What summed losses of samples come to.

    Args:
        totals (`Sequence[float]`): summed next-token losses of each sample, nats.
        counts (`Sequence[int]`): how many tokens each predicts.

    Returns:
        `dict[str, float]`: `perplexity`, `loss` (nats a token), `loss_standard_error` (samples are drawn, not tokens; 0 for one
        sample) and `num_tokens`.
    """
    loss, error = mean_with_error(totals, counts)
    return {
        "perplexity": math.exp(min(loss, 700.0)),
        "loss": loss,
        "loss_standard_error": error,
        "num_tokens": sum(counts),
    }
