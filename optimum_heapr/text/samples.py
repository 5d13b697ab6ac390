# Licensed under the Apache License, Version 2.0
"""Calibration samples: from the documents of one or more sources to rows of token ids."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..utils.errors import HeaprError
from ..utils.logging import get_logger
from ..utils.public import public_name
from .documents import token_rows, tokenized_documents, usable_columns
from .mixtures import Source, parse_sources, shares_of
from .sources import SHUFFLE_BUFFER, open_source


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

    from ..configuration import HeaprConfig


logger = get_logger(__name__)


@dataclass
class CalibrationData:
    """Tokenized calibration samples.

    Attributes:
        samples (`list[torch.Tensor]`): token ids, one 1-d int64 tensor a sample; lengths may differ.
        source (`str`): where they came from.
        seed (`int`): seed that chose them.
        seq_length (`int`): tokens asked for in a sample.
        origins (`list[str]`, *optional*): the part of a mixture that each sample is of; all are of `source` by default.
        held_out (`list[torch.Tensor]`, *optional*): further samples that are not calibrated on, to measure with.
        search (`list[torch.Tensor]`, *optional*): samples beyond those, to measure how much can go for `max_loss_increase`.
    """

    samples: list[torch.Tensor]
    source: str
    seed: int
    seq_length: int
    origins: list[str] = field(default_factory=list)
    held_out: list[torch.Tensor] = field(default_factory=list)
    search: list[torch.Tensor] = field(default_factory=list)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Hash of all token ids, how many there are, and the share of them that each source gave; no paths but names."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(len(sample).to_bytes(8, "little") + sample.numpy().tobytes())
        return {
            "source": public_name(self.source),
            "sha256": digest.hexdigest()[:16],
            "num_samples": len(self.samples),
            "num_tokens": sum(map(len, self.samples)),
            "sources": self._shares(),
        }

    def _shares(self) -> list[dict[str, Any]]:
        """Samples and tokens of each source, in the order of their names."""
        return [
            {
                "name": public_name(name),
                "num_samples": len(indices),
                "num_tokens": sum(len(self.samples[index]) for index in indices),
            }
            for name, indices in self._by_source().items()
        ]

    @property
    def num_sources(self) -> int:
        """Sources that the samples are of."""
        return len(self._by_source())

    def source_of(self, index: int) -> int:
        """Number of the source that a sample is of, in the order of their names."""
        return next(number for number, indices in enumerate(self._by_source().values()) if index in indices)

    def _by_source(self) -> dict[str, list[int]]:
        """Indices of the samples of each source, in the order of their names."""
        origins = self.origins or [self.source] * len(self.samples)
        indices: dict[str, list[int]] = {name: [] for name in sorted(set(origins))}
        for index, name in enumerate(origins):
            indices[name].append(index)
        return indices

    def micro_batches(self, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of `input_ids` and `attention_mask` [samples, tokens], padded on the right, `sample_index`, and the number of
        the `source` that all samples of a batch are of; in the order of their first samples."""
        batches = [
            (indices[start : start + batch_size], number)
            for number, indices in enumerate(self._by_source().values())
            for start in range(0, len(indices), batch_size)
        ]
        for indices, number in sorted(batches):
            rows = [self.samples[index] for index in indices]
            lengths = torch.tensor([len(row) for row in rows])
            yield {
                "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
                "attention_mask": (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long(),
                "sample_index": torch.tensor(indices),
                "source": torch.tensor(number),
            }


def load_calibration_data(
    config: HeaprConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Dataset | IterableDataset | str | None = None,
    part: Callable[[Dataset, str], Dataset] = lambda rows, source: rows,
) -> CalibrationData:
    """Loads and tokenizes the samples that `config` asks for.

    A column `input_ids` is used as it is, one row a sample. `messages` are rendered by the chat template of the
    tokenizer. Other text is shuffled by document, tokenized, closed by end-of-text tokens, and packed into `num_samples` rows
    of `seq_length` tokens, without padding: a piece of each document before a second one of any. With `packing=False` a
    document is a sample, cut off after `seq_length` tokens. The samples of a mixture come in an order drawn with the seed. Of a
    stream, the documents are drawn from a buffer of `SHUFFLE_BUFFER`, and no more are read than it takes.

    `eval_samples` samples behind these, as far as there are any, are held out, unless `eval_dataset` is to be measured on; with
    `max_loss_increase` twice as many, and every other one is for its search.

    Args:
        config (`HeaprConfig`): its calibration part is used.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed unless the data has `input_ids`.
        dataset (`Dataset`, `IterableDataset`, `str` or list of texts, *optional*): used in place of `config.dataset`.
        part (`Callable`, *optional*): takes the rows of each source and its name, returns the rows to use; by default all.

    Raises:
        HeaprError: if the data is missing, of another type, empty, has no usable column, or has samples shorter than two tokens, or a
            mixture cannot be read or has a source that is too small a part of the samples.
    """
    import datasets

    dataset = config.dataset if dataset is None else dataset
    check_named(dataset)
    if isinstance(dataset, (list, tuple)) and dataset and all(isinstance(text, str) for text in dataset):
        dataset = datasets.Dataset.from_dict({config.text_column: list(dataset)})
    if not isinstance(dataset, (str, os.PathLike)):
        name = type(dataset).__name__
        if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
            raise HeaprError(
                f"dataset: is of type {name}; pass a path, a name on the Hub, a list of texts, or one split as a "
                "`datasets.Dataset`"
            )
        samples, held_out = _samples(part(dataset, name), name, config.num_samples, config, tokenizer)
        return CalibrationData(samples, name, config.seed, config.seq_length, [], *_parted(held_out, config))
    sources = _sources(config, dataset)
    samples, origins, held_out = [], [], []
    for source, count in zip(sources, shares_of(sources, config.num_samples)):
        rows = open_source(source, config.dataset_config, config.split, config.dataset_streaming)
        found, further = _samples(part(rows, source.label), source.label, count, config, tokenizer)
        samples += found
        held_out += further
        origins += [source.label] * len(found)
    if len(sources) > 1:
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(config.seed)).tolist()
        samples, origins = [samples[index] for index in order], [origins[index] for index in order]
    return CalibrationData(samples, str(dataset), config.seed, config.seq_length, origins, *_parted(held_out, config))


def _sources(config: HeaprConfig, dataset: str | os.PathLike) -> list[Source]:
    """The parts of a mixture, or the one source.

    Raises:
        HeaprError: if the name cannot be read, or the worst of several sources is asked for and there is one.
    """
    sources = parse_sources(dataset)
    if config.reduction_over_sources == "max" and len(sources) == 1:
        raise HeaprError(
            f"reduction_over_sources='max': dataset={os.fspath(dataset)!r} is one source; name a mixture, a.jsonl:0.5,b.jsonl:0.5, or "
            "leave it out"
        )
    return sources


def _parted(held_out: list[torch.Tensor], config: HeaprConfig) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What is held out to measure on, and what to search on: of every source in either."""
    return (held_out, []) if config.max_loss_increase is None else (held_out[::2], held_out[1::2])


def check_calibration_text(config: HeaprConfig) -> None:
    """Opens the text that `config` names, so that one that cannot be used is refused before a model is loaded for it.

    Raises:
        HeaprError: if it is missing or empty, or has no column to read.
    """
    check_named(config.dataset)
    for source in _sources(config, config.dataset):
        rows = open_source(source, config.dataset_config, config.split, config.dataset_streaming)
        usable_columns(rows, source.label, config.text_column)


def check_named(dataset: Any) -> None:
    """Refuses `None` in the place of a text.

    Raises:
        HeaprError: saying what to name.
    """
    if dataset is None:
        raise HeaprError("dataset=None: name the text, a local file or a dataset on the Hub; its kind matters")


def _samples(
    rows: Dataset | IterableDataset,
    source: str,
    count: int,
    config: HeaprConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """At most `count` samples of one source, each of at least two tokens, and its share of those held out."""
    columns = usable_columns(rows, source, config.text_column)
    wanted = config.eval_samples * (1 if config.max_loss_increase is None else 2)
    held_out = 0 if config.eval_dataset is not None else -(-wanted * count // config.num_samples)
    if "input_ids" in columns:
        samples = list(itertools.islice(token_rows(rows, source), count + held_out))
    else:
        if not hasattr(rows, "__len__"):
            rows, order = rows.shuffle(seed=config.seed, buffer_size=SHUFFLE_BUFFER), None
        else:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
        documents = tokenized_documents(rows, order, source, tokenizer, config.text_column)
        if config.packing:
            cut = packed(by_turns(documents, config.seq_length, config.seed), config.seq_length)
        else:
            cut = one_a_row(documents, config.seq_length)
        samples = list(itertools.islice(cut, count + held_out))
    samples, further = samples[:count], [sample for sample in samples[count:] if len(sample) >= 2]
    short = [index for index, sample in enumerate(samples) if len(sample) < 2]
    if short or not samples:
        where = f"sample {short[0]} has {len(samples[short[0]])} tokens" if short else "holds less than two tokens"
        raise HeaprError(
            f"dataset={source!r}: {where}; every sample needs at least two, one to predict from the other"
        )
    if len(samples) < count:
        logger.warning("%s gives only %d of the %d samples asked for", source, len(samples), count)
    return samples, further


def by_turns(documents: Iterable[list[int]], seq_length: int, seed: int) -> Iterator[list[int]]:
    """Pieces of at most `seq_length` tokens: one of each document, drawn with the seed, then another of each, and so on.

    Few samples then come from as many documents as there are. Whole documents would fill them with the first few, and experts
    that serve other text would lose their atomic experts.
    """
    generator, later = torch.Generator().manual_seed(seed), []
    for ids in documents:
        starts = torch.arange(0, len(ids), seq_length)
        starts = starts[torch.randperm(len(starts), generator=generator)].tolist()
        pieces = [ids[start : start + seq_length] for start in starts]
        yield from pieces[:1]
        if len(pieces) > 1:
            later.append(pieces[1:])
    for turn in itertools.zip_longest(*later):
        yield from (piece for piece in turn if piece is not None)


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


def one_a_row(documents: Iterable[list[int]], seq_length: int) -> Iterator[torch.Tensor]:
    """The beginning of each document, at most `seq_length` tokens; documents of less than two tokens are left out."""
    for ids in documents:
        if len(ids) >= 2:
            yield torch.tensor(ids[:seq_length], dtype=torch.int64)
