# Licensed under the Apache License, Version 2.0
"""Perplexity as published results measure it, by a name that stands for all of it.

The test split as one text, its rows joined, tokenized once, cut into full windows; what is left at the end is dropped. That is
how GPTQ (Frantar et al. 2022) and, after it, SparseGPT, Wanda and HEAPr measure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..utils.errors import HeaprError
from .sources import open_dataset


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Protocol:
    """
    Attributes:
        dataset, dataset_config, split, column (`str`): where the rows are.
        joined_by (`str`): what stands between two rows.
        revision (`str`, *optional*): of the repository.
    """

    dataset: str
    dataset_config: str
    split: str
    column: str
    joined_by: str
    revision: str | None = None

    def rows(self) -> Dataset:
        """The rows, from the Hub or from what was downloaded before.

        Raises:
            HeaprError: if neither is there.
        """
        return open_dataset(self.dataset, self.dataset_config, self.split, revision=self.revision)

    def windows(self, tokenizer: PreTrainedTokenizerBase | None, seq_length: int) -> Iterator[torch.Tensor]:
        """Full windows of token ids.

        Raises:
            HeaprError: if there is no tokenizer, the dataset cannot be loaded, or is shorter than one window.
        """
        if tokenizer is None:
            raise HeaprError(f"dataset={self.dataset!r}: holds text but the model has no tokenizer; pass one")
        rows = self.rows()
        ids = tokenizer(self.joined_by.join(rows[self.column]), verbose=False)["input_ids"]
        if len(ids) < seq_length:
            raise HeaprError(f"seq_length={seq_length}: {self.dataset!r} has {len(ids)} tokens; lower it")
        return iter(torch.tensor(ids).split(seq_length)[: len(ids) // seq_length])


PROTOCOLS = {
    "wikitext2": Protocol("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", "\n\n"),
    # Its repository holds a loading script, which `datasets` no longer runs; the Hub's own conversion holds the rows.
    "ptb": Protocol(
        "ptb-text-only/ptb_text_only", "penn_treebank", "test", "sentence", " ", revision="refs/convert/parquet"
    ),
}
