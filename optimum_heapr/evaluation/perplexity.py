# Licensed under the Apache License, Version 2.0
"""Perplexity of any causal language model on any text."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..experts import experts_of_any_width
from ..text.documents import token_rows, tokenized_documents, usable_columns
from ..text.protocols import PROTOCOLS
from ..text.samples import packed
from ..text.sources import open_dataset
from ..utils.errors import HeaprError
from ..utils.logging import progress, show_throughput
from ..utils.positions import warn_of_positions
from .four_bits import layers_of_any_shape
from .losses import perplexity


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        dataset (`Dataset` or `str`): local path, name on the Hub, `demo`, a `datasets.Dataset`, or one of the published
            protocols: `wikitext2`, `ptb`.
        seq_length (`int`): tokens in a window; the paper uses 2048.
        num_samples (`int`, *optional*): windows, from the beginning of the text; all of them by default.
        dataset_config, split, text_column (`str`): as in `HeaprConfig`; a protocol has its own.

    Returns:
        `dict[str, float]`: `perplexity`, `loss`, `loss_standard_error`, `num_tokens`; see [`~optimum_heapr.evaluation.losses.perplexity`].

    Raises:
        HeaprError: if the data is missing or too short, or the loss is not finite.
    """
    windows = evaluation_windows(tokenizer, dataset, seq_length, num_samples, dataset_config, split, text_column)
    warn_of_positions(model, windows)
    losses = window_losses(model, windows, source_name(dataset))
    return perplexity(losses, [len(window) - 1 for window in windows])


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Dataset | str | os.PathLike,
    seq_length: int = 2048,
    num_samples: int | None = None,
    dataset_config: str | None = None,
    split: str = "test",
    text_column: str = "text",
) -> list[torch.Tensor]:
    """The windows that [`evaluate_perplexity`] measures on: token ids, each of at least two. Arguments, errors: as there."""
    if seq_length < 2:
        raise HeaprError(f"seq_length={seq_length}: must be at least 2, one token to predict from the other")
    if num_samples is not None and num_samples < 1:
        raise HeaprError(f"num_samples={num_samples}: must be at least 1; leave it out for all windows")
    source, protocol = source_name(dataset), PROTOCOLS.get(str(dataset))
    if protocol is not None:
        windows = protocol.windows(tokenizer, seq_length)
        return list(itertools.islice(windows, num_samples))
    rows = open_evaluation_text(dataset, dataset_config, split, text_column)
    if "input_ids" in rows.column_names:
        windows = (row[:seq_length] for row in token_rows(rows, source))
    else:
        windows = packed(tokenized_documents(rows, range(len(rows)), source, tokenizer, text_column), seq_length)
    windows = [window for window in itertools.islice(windows, num_samples) if len(window) >= 2]
    if not windows:
        raise HeaprError(f"dataset={source!r}: holds less than two tokens; name one with text in it")
    return windows


def open_evaluation_text(
    dataset: Dataset | str | os.PathLike,
    dataset_config: str | None = None,
    split: str = "test",
    text_column: str = "text",
) -> Dataset:
    """The rows that [`evaluate_perplexity`] joins, also of the published protocols. Arguments: as there.

    Raises:
        HeaprError: if they are missing or empty, or have no column to read.
    """
    named = isinstance(dataset, (str, os.PathLike))
    if named and str(dataset) in PROTOCOLS:
        return PROTOCOLS[str(dataset)].rows()
    rows = open_dataset(dataset, dataset_config, split, "evaluation") if named else dataset
    usable_columns(rows, source_name(dataset), text_column)
    return rows


def source_name(dataset: Dataset | str | os.PathLike) -> str:
    """What messages call a dataset: its path or name, or else its class."""
    return str(dataset) if isinstance(dataset, (str, os.PathLike)) else type(dataset).__name__


@torch.no_grad()
def window_losses(model: PreTrainedModel, windows: Sequence[torch.Tensor], source: str = "text") -> list[float]:
    """Summed next-token losses of each window, in nats; the first token of a window is given.

    Raises:
        HeaprError: if one is not finite.
    """
    device = model.get_input_embeddings().weight.device
    losses, tokens = [], 0
    with evaluation_mode(model), progress(windows, desc="Evaluating", unit="window") as bar:
        for index, window in enumerate(bar):
            ids = window.to(device).unsqueeze(0)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            targets = ids[0, 1:].to(logits.device)
            parts = zip(logits.split(1024), targets.split(1024))  # float32 a part at a time: vocabularies are large
            loss = sum(F.cross_entropy(part.float(), target, reduction="sum").item() for part, target in parts)
            if not math.isfinite(loss):
                raise HeaprError(
                    f"loss={loss}: not finite in window {index} of {source!r}; load the model in bfloat16 or float32, "
                    "and if it is, look at its weights"
                )
            losses.append(loss)
            tokens += len(window)
            show_throughput(bar, tokens)
    return losses


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """No dropout until the block ends, and experts run whatever their width, in 4 bits as well; then every module is in the mode
    that it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with experts_of_any_width(model), layers_of_any_shape(model):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
