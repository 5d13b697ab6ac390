# Licensed under the Apache License, Version 2.0
"""Token-level perplexity as an `evaluate.Metric` that needs no download."""

import math
from collections.abc import Sequence

import datasets
import evaluate


class TokenPerplexity(evaluate.Metric):
    """Perplexity from summed losses, with a standard error over samples.

    `predictions` are the summed next-token losses of the samples in nats, `references` how many tokens each predicts:

    ```python
    from optimum_heapr.evaluation.metric import TokenPerplexity

    result = TokenPerplexity().compute(predictions=[20.0, 22.0], references=[10, 10])
    assert round(result["loss"], 3) == 2.1
    ```

    The result holds `perplexity`, `loss` (nats a token), `loss_standard_error` (samples are drawn, not tokens; 0 for one
    sample) and `num_tokens`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Token-level perplexity from summed losses and token counts",
            citation="",
            inputs_description="predictions: summed losses in nats; references: predicted tokens",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        loss, error = mean_with_error(predictions, references)
        return {
            "perplexity": math.exp(min(loss, 700.0)),
            "loss": loss,
            "loss_standard_error": error,
            "num_tokens": sum(references),
        }


def mean_with_error(totals: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Mean over tokens of what was summed over samples, and its standard error: that of a ratio of two sums over samples.

    Of the differences between two models on the same samples it gives the error of the difference, which is much smaller
    than the errors of the two losses: hard samples are hard for both.
    """
    tokens, samples = sum(counts), len(counts)
    mean = math.fsum(totals) / tokens
    squares = math.fsum((total - mean * count) ** 2 for total, count in zip(totals, counts))
    return mean, math.sqrt(squares * samples / (samples - 1)) / tokens if samples > 1 else 0.0
