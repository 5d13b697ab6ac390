# Licensed under the Apache License, Version 2.0
"""Where calibration text comes from: files, Hub datasets, named presets, and mixtures of these written as one string."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..demo import DEMO_MODEL, demo_texts
from ..utils.errors import HeaprError


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase


# What `datasets` calls the builders of local files.
FILE_BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".md": "text",
}

# name: (dataset on the Hub, configuration, split)
PRESETS = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")}
"""Calibration text of published results, by a name that stands for all of it."""

SHUFFLE_BUFFER = 1000
"""Documents of a stream that are held at once, and drawn from; its files, if there are several, are shuffled as well."""

# Columns that hold the two sides of a dialogue of one turn.
_PAIRS = (("prompt", "response"), ("instruction", "output"))


@dataclass(frozen=True)
class Source:
    """One part of a mixture.

    Attributes:
        name (`str`): local path, name on the Hub, or name of a preset.
        weight (`float`): its share of the samples, in units of the other weights.
        split, dataset_config (`str`, *optional*): written behind the name in brackets; `None` where they were not.
    """

    name: str
    weight: float = 1.0
    split: str | None = None
    dataset_config: str | None = None

    @property
    def label(self) -> str:
        """The source as it was written, without its weight."""
        inside = "/".join(filter(None, (self.dataset_config, self.split)))
        return f"{self.name}[{inside}]" if inside else self.name


def parse_sources(text: str | os.PathLike) -> list[Source]:
    """Reads `name[split]:weight` parts between commas; every piece but the name may be left out.

    A configuration of a Hub dataset stands before the split: `name[config/split]`. What exists as a local path is that
    path, whatever characters it has. Weights are relative to one another; without any, all sources count the same.

    Raises:
        HeaprError: if a part has no name or is named twice, or a weight is not positive or only some are given.
    """
    text = os.fspath(text)
    if text and Path(text).exists():
        return [Source(text)]
    # A comma inside brackets belongs to what stands there.
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", text)]
    read = [_read_source(part, text) for part in parts]
    labels = [source.label for source, _ in read]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise HeaprError(
            f"dataset={text!r}: names {twice!r} twice; name each source once, with the sum of the weights"
        )
    weighted = [source.label for source, has_weight in read if has_weight]
    if weighted and len(weighted) < len(read):
        missing = next(source.label for source, has_weight in read if not has_weight)
        raise HeaprError(f"dataset={text!r}: {missing!r} has no weight; give all sources one, as in name:0.5, or none")
    return [source for source, _ in read]


def _read_source(part: str, text: str) -> tuple[Source, bool]:
    """A part of the string, and whether it has a weight."""
    weight, has_weight = 1.0, False
    if not Path(part).exists() and (match := re.fullmatch(r"(.+):([-+]?[\d.]+(?:[eE][-+]?\d+)?|nan|inf)", part)):
        try:
            part, weight, has_weight = match[1], float(match[2]), True
        except ValueError:
            pass  # something like name:1.2.3, a name after all
    if not 0 < weight < math.inf:
        raise HeaprError(f"dataset={text!r}: {part!r} has the weight {weight:g}; weights are positive numbers")
    split = dataset_config = None
    if not Path(part).exists() and (match := re.fullmatch(r"([^\[]+)\[(.+)\]", part)):
        part, inside = match[1], match[2]
        dataset_config, _, split = inside.rpartition("/")
    if not part:
        raise HeaprError(f"dataset={text!r}: a name is missing; write name[split]:weight, with commas in between")
    return Source(part, weight, split or None, dataset_config or None), has_weight


def shares_of(sources: list[Source], num_samples: int) -> list[int]:
    """How many of `num_samples` each source gives: its weight's part, by the method of largest remainders.

    Raises:
        HeaprError: if a source would give none.
    """
    total = sum(source.weight for source in sources)
    exact = [num_samples * source.weight / total for source in sources]
    counts = [math.floor(share + 1e-9) for share in exact]  # weights such as 0.1 are not exact
    by_remainder = sorted(range(len(sources)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: num_samples - sum(counts)]:
        counts[index] += 1
    for source, count in zip(sources, counts):
        if count == 0:
            raise HeaprError(
                f"num_samples={num_samples}: too few for {source.label!r} with {source.weight / total:.2%} of the weight; "
                "raise num_samples or the weight, or leave the source out"
            )
    return counts


def open_source(
    source: Source, dataset_config: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """Opens one source. Its own configuration and split go before the ones given here.

    Raises:
        HeaprError: as [`open_dataset`], or if a preset is asked for in another split.
    """
    if source.name in PRESETS:
        if source.split or source.dataset_config:
            raise HeaprError(
                f"dataset={source.label!r}: the preset has its own split; name the dataset itself instead"
            )
        return articles(open_dataset(*PRESETS[source.name]))  # small, and its lines belong together
    dataset_config, split = source.dataset_config or dataset_config, source.split or split
    return open_dataset(source.name, dataset_config, split, streaming=streaming)


def open_dataset(
    name: str | os.PathLike,
    dataset_config: str | None = None,
    split: str = "train",
    demo_split: str = "calibration",
    revision: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Opens a local file or folder, the embedded demonstration text (`demo`), or a dataset on the Hub.

    Args:
        name (`str`): path or name.
        dataset_config, split (`str`, *optional*): of a dataset on the Hub.
        demo_split (`str`): which part of the demonstration text `demo` stands for.
        revision (`str`, *optional*): of a dataset on the Hub.
        streaming (`bool`): read files and what is on the Hub only as far as rows are asked for. What is small or
            memory-mapped anyway, `demo` and saved datasets, is opened as without.

    Raises:
        HeaprError: if a local path does not exist or cannot be parsed, or the Hub has no such dataset.
    """
    import datasets

    path = Path(name)
    if str(name) == DEMO_MODEL:
        return datasets.Dataset.from_dict({"text": demo_texts(demo_split)})
    builder = FILE_BUILDERS.get(path.suffix)
    with _loading_errors(name):
        if path.is_dir() and (path / "dataset_info.json").is_file():
            return datasets.load_from_disk(str(path))
        if path.is_file() and path.stat().st_size == 0:
            raise HeaprError(f"dataset={str(name)!r}: is empty; name one with text in it")
        if path.is_file() and builder:
            # A text file is one document, not one document a line.
            options = {"sample_by": "document"} if builder == "text" else {}
            return datasets.load_dataset(builder, data_files=str(path), split="train", streaming=streaming, **options)
        if path.exists() and not path.is_dir():
            raise HeaprError(f"dataset={str(name)!r}: unknown kind of file; use one of {', '.join(FILE_BUILDERS)}")
        if not path.exists() and (builder or path.is_absolute() or str(name).startswith(".")):
            raise HeaprError(f"dataset={str(name)!r}: no such file or folder")
        options = {"split": split, "revision": revision, "streaming": streaming}
        return datasets.load_dataset(str(name), dataset_config, **options)


@contextmanager
def _loading_errors(name: str | os.PathLike) -> Iterator[None]:
    """Turns what `datasets` raises into an error that names the source."""
    import datasets

    try:
        yield
    except HeaprError:
        raise
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HeaprError(f"dataset={str(name)!r}: cannot be loaded ({type(error).__name__}: {reason})") from error


def rows_of(stream: IterableDataset, source: str) -> Iterator[dict[str, Any]]:
    """The rows of a stream, which shows only while it is read whether it can be.

    Raises:
        HeaprError: as [`open_dataset`].
    """
    with _loading_errors(source):
        yield from stream


def columns_of(rows: Dataset | IterableDataset, source: str) -> list[str]:
    """Names of the columns; of a stream that does not tell they are those of its first row, and none if it has no row."""
    known = rows.column_names
    return list(next(rows_of(rows, source), {})) if known is None else known


def usable_columns(rows: Dataset | IterableDataset, source: str, text_column: str) -> list[str]:
    """As [`columns_of`], of rows that have something to calibrate or evaluate on.

    Raises:
        HeaprError: if there are no rows, or no column of tokens, messages or text.
    """
    columns = columns_of(rows, source)
    if not columns or hasattr(rows, "__len__") and len(rows) == 0:
        raise HeaprError(f"dataset={source!r}: is empty; name one with text in it")
    if "input_ids" not in columns:
        _reader_of(columns, source, text_column)
    return columns


def articles(lines: Dataset) -> Dataset:
    """The articles of WikiText, whose rows are lines; a heading such as ` = Title = ` opens one."""
    import datasets

    found: list[list[str]] = [[]]
    for line in lines["text"]:
        if re.match(r" = [^=]", line):
            found.append([])
        found[-1].append(line)
    texts = ["".join(lines) for lines in found]
    return datasets.Dataset.from_dict({"text": [text for text in texts if text.strip()]})


def tokenized_documents(
    rows: Dataset | IterableDataset,
    order: Iterable[int] | None,
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    text_column: str,
) -> Iterator[list[int]]:
    """Token ids of one document after another, each closed by the end-of-text token if the tokenizer has one.

    A document is a row's `messages` or dialogue of one turn (`prompt` and `response`, `instruction` and `output`),
    rendered by the chat template, or its text. The rows are those of `order`, or, of a stream, all as they come.

    Raises:
        HeaprError: if there is no tokenizer, no such column, or no chat template for messages.
    """
    if tokenizer is None:
        raise HeaprError(f"dataset={source!r}: holds text but the model has no tokenizer; pass one, or input_ids")
    columns = columns_of(rows, source)
    if "messages" in columns and tokenizer.chat_template is None:
        raise HeaprError(f"dataset={source!r}: holds messages but the tokenizer has no chat template; use text")
    read = _reader_of(columns, source, text_column)
    for row in rows_of(rows, source) if order is None else map(rows.__getitem__, order):
        document = read(row)
        if document:
            yield _encoded(document, tokenizer) + (
                [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
            )


def _reader_of(columns: list[str], source: str, text_column: str) -> Any:
    """What takes a text or messages out of a row, by the columns there are; both are empty where a row holds nothing."""
    if "messages" in columns:
        return lambda row: row.get("messages")

    def text_of(row: dict[str, Any], column: str) -> str:
        if not isinstance(value := row.get(column) or "", str):
            raise HeaprError(
                f"dataset={source!r}: {column!r} holds {type(value).__name__}, not text; name another column"
            )
        return value

    pair = next((pair for pair in _PAIRS if set(pair) <= set(columns)), None)
    if pair is not None and text_column not in columns:

        def turn(row: dict[str, Any]) -> list[dict[str, str]]:
            prompt, response = (text_of(row, column) for column in pair)
            if pair[0] == "instruction" and "input" in columns and (context := text_of(row, "input")):
                prompt = f"{prompt}\n{context}"
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return messages if prompt or response else []

        return turn
    if text_column not in columns:
        raise HeaprError(f"text_column={text_column!r}: {source!r} has columns {', '.join(columns)}; name one of them")
    return lambda row: text_of(row, text_column)


def _encoded(document: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not isinstance(document, str) and tokenizer.chat_template is not None:
        return tokenizer.apply_chat_template(document, return_dict=False)
    if not isinstance(document, str):
        document = "\n".join(message["content"] for message in document)
    # The length warning of the tokenizer is about feeding a document whole; documents are cut later.
    return tokenizer(document, verbose=False)["input_ids"]
