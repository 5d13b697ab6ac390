# Licensed under the Apache License, Version 2.0
"""Calibration text: from a file, a Hub dataset or a `datasets.Dataset` to rows of token ids."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..demo import DEMO_MODEL, demo_texts
from ..utils.errors import HeaprError
from ..utils.logging import get_logger


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..configuration import HeaprConfig


logger = get_logger(__name__)

# What `datasets` calls the builders of local files.
_FILE_BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".md": "text",
}


@dataclass
class CalibrationData:
    """Tokenized calibration samples.

    Attributes:
        samples (`list[torch.Tensor]`): token ids, one 1-d int64 tensor a sample; lengths may differ.
        source (`str`): where they came from.
        seed (`int`): seed that chose them.
        seq_length (`int`): tokens asked for in a sample.
    """

    samples: list[torch.Tensor]
    source: str
    seed: int
    seq_length: int

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Hash of all token ids, and how many there are."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(len(sample).to_bytes(8, "little") + sample.numpy().tobytes())
        return {
            "source": self.source,
            "sha256": digest.hexdigest()[:16],
            "num_samples": len(self.samples),
            "num_tokens": sum(map(len, self.samples)),
        }

    def micro_batches(self, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of `input_ids` and `attention_mask` [samples, tokens], padded on the right, and `sample_index`."""
        for start in range(0, len(self.samples), batch_size):
            rows = self.samples[start : start + batch_size]
            lengths = torch.tensor([len(row) for row in rows])
            yield {
                "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
                "attention_mask": (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long(),
                "sample_index": torch.arange(start, start + len(rows)),
            }


def load_calibration_data(
    config: HeaprConfig, tokenizer: PreTrainedTokenizerBase | None, dataset: Dataset | str | None = None
) -> CalibrationData:
    """Loads and tokenizes the samples that `config` asks for.

    A column `input_ids` is used as it is, one row a sample. `messages` are rendered by the chat template of the
    tokenizer. Other text is shuffled by document, tokenized, joined with end-of-text tokens and cut into
    `num_samples` rows of `seq_length` tokens, without padding.

    Args:
        config (`HeaprConfig`): its calibration part is used.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed unless the data has `input_ids`.
        dataset (`Dataset` or `str`, *optional*): used in place of `config.dataset`.

    Raises:
        HeaprError: if the data is missing, empty, has no usable column, or has samples shorter than two tokens.
    """
    dataset = config.dataset if dataset is None else dataset
    if dataset is None:
        raise HeaprError("dataset=None: name calibration text, a local file or a dataset on the Hub; its kind matters")
    source = str(dataset) if isinstance(dataset, (str, os.PathLike)) else type(dataset).__name__
    rows = (
        open_dataset(dataset, config.dataset_config, config.split)
        if isinstance(dataset, (str, os.PathLike))
        else dataset
    )
    if len(rows) == 0:
        raise HeaprError(f"dataset={source!r}: is empty; name one with text in it")
    if "input_ids" in rows.column_names:
        samples = [torch.tensor(row, dtype=torch.int64) for row in rows[: config.num_samples]["input_ids"]]
    else:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
        documents = tokenized_documents(rows, order, source, tokenizer, config.text_column)
        samples = list(itertools.islice(packed(documents, config.seq_length), config.num_samples))
    short = [index for index, sample in enumerate(samples) if len(sample) < 2]
    if short or not samples:
        where = f"sample {short[0]} has {len(samples[short[0]])} tokens" if short else "holds less than two tokens"
        raise HeaprError(
            f"dataset={source!r}: {where}; every sample needs at least two, one to predict from the other"
        )
    if len(samples) < config.num_samples:
        logger.warning("%s gives only %d of the %d samples asked for", source, len(samples), config.num_samples)
    return CalibrationData(samples, source, config.seed, config.seq_length)


def open_dataset(
    name: str | os.PathLike, dataset_config: str | None = None, split: str = "train", demo_split: str = "calibration"
) -> Dataset:
    """Opens a local file or folder, the embedded demonstration text (`demo`), or a dataset on the Hub.

    Args:
        name (`str`): path or name.
        dataset_config, split (`str`, *optional*): of a dataset on the Hub.
        demo_split (`str`): which part of the demonstration text `demo` stands for.

    Raises:
        HeaprError: if a local path does not exist or cannot be parsed, or the Hub has no such dataset.
    """
    import datasets

    path = Path(name)
    if str(name) == DEMO_MODEL:
        return datasets.Dataset.from_dict({"text": demo_texts(demo_split)})
    builder = _FILE_BUILDERS.get(path.suffix)
    try:
        if path.is_dir() and (path / "dataset_info.json").is_file():
            return datasets.load_from_disk(str(path))
        if path.is_file() and path.stat().st_size == 0:
            raise HeaprError(f"dataset={str(name)!r}: is empty; name one with text in it")
        if path.is_file() and builder:
            # A text file is one document, not one document a line.
            options = {"sample_by": "document"} if builder == "text" else {}
            return datasets.load_dataset(builder, data_files=str(path), split="train", **options)
        if path.exists() and not path.is_dir():
            raise HeaprError(f"dataset={str(name)!r}: unknown kind of file; use one of {', '.join(_FILE_BUILDERS)}")
        if not path.exists() and (builder or path.is_absolute() or str(name).startswith(".")):
            raise HeaprError(f"dataset={str(name)!r}: no such file or folder")
        return datasets.load_dataset(str(name), dataset_config, split=split)
    except HeaprError:
        raise
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HeaprError(f"dataset={str(name)!r}: cannot be loaded ({type(error).__name__}: {reason})") from error


def tokenized_documents(
    rows: Dataset, order: Iterable[int], source: str, tokenizer: PreTrainedTokenizerBase | None, text_column: str
) -> Iterator[list[int]]:
    """Token ids of one document after another, each closed by the end-of-text token if the tokenizer has one.

    Raises:
        HeaprError: if there is no tokenizer, no such column, or no chat template for messages.
    """
    if tokenizer is None:
        raise HeaprError(f"dataset={source!r}: holds text but the model has no tokenizer; pass one, or input_ids")
    if "messages" in rows.column_names:
        if tokenizer.chat_template is None:
            raise HeaprError(f"dataset={source!r}: holds messages but the tokenizer has no chat template; use text")
        column, encode = "messages", lambda row: tokenizer.apply_chat_template(row, return_dict=False)
    elif text_column in rows.column_names:
        # The length warning of the tokenizer is about feeding a document whole; documents are cut later.
        column, encode = text_column, lambda row: tokenizer(row, verbose=False)["input_ids"]
    else:
        raise HeaprError(
            f"text_column={text_column!r}: {source!r} has columns {', '.join(rows.column_names)}; name one of them"
        )
    for index in order:
        document = rows[index][column]
        if document:
            yield encode(document) + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])


def packed(documents: Iterable[list[int]], seq_length: int) -> Iterator[torch.Tensor]:
    """Joins documents and cuts them into rows of `seq_length`; the last may be shorter. Reads no further than asked."""
    stream: list[int] = []
    for ids in documents:
        stream += ids
        while len(stream) >= seq_length:
            yield torch.tensor(stream[:seq_length], dtype=torch.int64)
            stream = stream[seq_length:]
    if len(stream) >= 2:
        yield torch.tensor(stream, dtype=torch.int64)
