# Licensed under the Apache License, Version 2.0
"""Perplexity of any causal language model on any text."""

from __future__ import annotations

import itertools
import math
import os
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..calibration.data import packed
from ..calibration.sources import open_dataset, tokenized_documents
from ..utils.errors import HeaprError
from ..utils.logging import progress
from .metric import TokenPerplexity


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Dataset | str | os.PathLike,
    seq_length: int = 2048,
    num_samples: int | None = None,
    dataset_config: str | None = None,
    split: str = "test",
    text_column: str = "text",
) -> dict[str, float]:
    """Perplexity on consecutive windows of the text, each predicted from its own beginning only.

    Args:
        model (`PreTrainedModel`): any model with a language-model head, pruned or not.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed unless the data has `input_ids`.
        dataset (`Dataset` or `str`): local path, name on the Hub, `demo`, or a `datasets.Dataset`.
        seq_length (`int`): tokens in a window; the paper uses 2048.
        num_samples (`int`, *optional*): windows, from the beginning of the text; all of them by default.
        dataset_config, split, text_column (`str`): as in `HeaprConfig`.

    Returns:
        `dict[str, float]`: `perplexity`, `loss`, `loss_standard_error`, `num_tokens`; see [`TokenPerplexity`].

    Raises:
        HeaprError: if the data is missing or too short, or the loss is not finite.
    """
    if seq_length < 2:
        raise HeaprError(f"seq_length={seq_length}: must be at least 2, one token to predict from the other")
    if num_samples is not None and num_samples < 1:
        raise HeaprError(f"num_samples={num_samples}: must be at least 1; leave it out for all windows")
    source = str(dataset) if isinstance(dataset, (str, os.PathLike)) else type(dataset).__name__
    rows = open_dataset(dataset, dataset_config, split, "evaluation") if source == str(dataset) else dataset
    if "input_ids" in rows.column_names:
        windows = (torch.tensor(row[:seq_length]) for row in rows["input_ids"])
    else:
        windows = packed(tokenized_documents(rows, range(len(rows)), source, tokenizer, text_column), seq_length)
    windows = [window for window in itertools.islice(windows, num_samples) if len(window) >= 2]
    if not windows:
        raise HeaprError(f"dataset={source!r}: holds less than two tokens; name one with text in it")

    device = model.get_input_embeddings().weight.device
    training = {module: module.training for module in model.modules()}
    model.eval()
    losses = []
    try:
        for index, window in enumerate(progress(windows, desc="Evaluating", unit="window")):
            ids = window.to(device).unsqueeze(0)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            targets = ids[0, 1:].to(logits.device)
            parts = zip(logits.split(1024), targets.split(1024))  # float32 a part at a time: vocabularies are large
            loss = sum(F.cross_entropy(part.float(), target, reduction="sum").item() for part, target in parts)
            if not math.isfinite(loss):
                raise HeaprError(
                    f"loss={loss}: not finite in window {index} of {source!r}; load the model in bfloat16"
                )
            losses.append(loss)
    finally:
        for module, mode in training.items():
            module.training = mode
    return TokenPerplexity().compute(predictions=losses, references=[len(window) - 1 for window in windows])
