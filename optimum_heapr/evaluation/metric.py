# Licensed under the Apache License, Version 2.0
"""Token-level perplexity as an `evaluate.Metric` that needs no download."""

import datasets
import evaluate

from .losses import perplexity


class TokenPerplexity(evaluate.Metric):
    """Perplexity from summed losses, with a standard error over samples.

    `predictions` are the summed next-token losses of the samples in nats, `references` how many tokens each predicts:

    ```python
    from optimum_heapr.evaluation.metric import TokenPerplexity

    result = TokenPerplexity().compute(predictions=[20.0, 22.0], references=[10, 10])
    assert round(result["loss"], 3) == 2.1
    ```

    The result is that of [`~optimum_heapr.evaluation.losses.perplexity`], which this package computes by itself: importing
    `evaluate` takes longer than importing torch.
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
        return perplexity(predictions, references)
