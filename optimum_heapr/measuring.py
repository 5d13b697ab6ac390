# Licensed under the Apache License, Version 2.0
"""What plans cost, measured on one model: it is masked and not cut, so that any number of them can be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .evaluation.losses import mean_with_error
from .evaluation.perplexity import evaluation_windows, source_name, window_losses
from .experts import find_expert_blocks
from .planning.plan import PruningPlan
from .surgery.masking import masked
from .utils.errors import HeaprError
from .utils.placement import place
from .utils.positions import warn_of_positions
from .utils.sharded import is_sharded


if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .calibration.statistics import AtomicStatistics
    from .configuration import HeaprConfig
    from .text.samples import CalibrationData


Measure = Callable[[PruningPlan], tuple[float, float]]
"""Gives the measured increase of the loss under a plan, in nats a token, and its standard error."""


def text_measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    statistics: AtomicStatistics,
    config: HeaprConfig,
    text: Dataset | str,
    windows: int = 24,
    window_length: int = 512,
) -> Measure:
    """[`loss_measure`] on windows of some text, once it is known that this model and the statistics serve.

    Args:
        model (`PreTrainedModel`): unpruned, in memory.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the model.
        statistics (`AtomicStatistics`): what plans are made from, and compensated with.
        config (`HeaprConfig`): `compensate` is used.
        text (`Dataset` or `str`): as for [`~optimum_heapr.evaluation.perplexity.evaluate_perplexity`].
        windows, window_length (`int`): how many, at least two, and tokens in each.

    Raises:
        HeaprError: if the model is another one, the text cannot be read, or compensation needs more than there is.
    """
    for name, value in {"windows": windows, "window_length": window_length}.items():
        if value < 2:
            raise HeaprError(f"{name}={value}: must be at least 2; leave it out for the default")
    statistics.check_model(model, find_expert_blocks(model))
    if is_sharded(model):
        raise HeaprError(
            "model: is spread over processes, and plans are measured with it whole; leave the text out, or load the model in one "
            "process"
        )
    if config.compensates_blocks:
        raise HeaprError(
            "compensation_scope='block': a frontier measures without it, or with the scope 'expert'; max_loss_increase measures it"
        )
    if config.compensates_experts:
        for path, block in statistics.blocks.items():
            block.check_grams(path, "compensate=True", gradients=False)
    found = evaluation_windows(tokenizer, text, window_length, windows)
    if len(found) < 2:
        raise HeaprError(
            f"text={source_name(text)!r}: has one window of {window_length} tokens, of which no error can be told; lower window_length, "
            "or name a longer text"
        )
    place(model)
    warn_of_positions(model, found)
    return loss_measure(model, found, source_name(text), statistics)


def loss_measure(
    model: PreTrainedModel,
    windows: Sequence[torch.Tensor],
    source: str = "text",
    statistics: AtomicStatistics | None = None,
    data: CalibrationData | None = None,
) -> Measure:
    """Measures plans on one model, which is masked and not cut: it stays as it is.

    Args:
        model (`PreTrainedModel`): unpruned, in memory.
        windows (`Sequence[torch.Tensor]`): token ids, as `evaluation.perplexity.evaluation_windows` makes them.
        source (`str`): what messages call the text.
        statistics, data (*optional*): what plans with compensation need, as for
            [`~optimum_heapr.surgery.masking.masked`].
    """
    counts = [len(window) - 1 for window in windows]
    unpruned = window_losses(model, windows, source)

    def measure(plan: PruningPlan) -> tuple[float, float]:
        with masked(model, plan, statistics, data):
            pruned = window_losses(model, windows, source)
        return mean_with_error([after - before for before, after in zip(unpruned, pruned)], counts)

    return measure
