# Licensed under the Apache License, Version 2.0
"""Where calibration text comes from: files, Hub datasets, named presets, and mixtures of these written as one string."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..demo import DEMO_MODEL, demo_texts
from ..utils.errors import HeaprError, reason_of
from .mixtures import Source


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


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
            file = glob.escape(str(path))  # it would be a pattern otherwise
            return datasets.load_dataset(builder, data_files=file, split="train", streaming=streaming, **options)
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
    except (OSError, ValueError, TypeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        while error.__cause__ is not None:  # `datasets` only says that something happened
            error = error.__cause__
        # A TypeError is one of Arrow's, which says what does not fit.
        reason = " ".join(str(error).split())[:300] if isinstance(error, TypeError) else reason_of(error)
        hint = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        if glob.has_magic(str(name)) and os.path.isdir(name):
            hint = "; `datasets` takes *, ? and [ in the name of a folder for a pattern: rename it, or name the files in it"
        if isinstance(error, ConnectionError):
            hint = "; name a file that is here, or try again where the Hub can be reached"
        raise HeaprError(f"dataset={str(name)!r}: cannot be loaded ({reason}){hint}") from error


def rows_of(
    rows: Dataset | IterableDataset, source: str, order: Iterable[int] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows, all or those of `order`: whether they can be read shows only while they are.

    Raises:
        HeaprError: as [`open_dataset`].
    """
    with _loading_errors(source):
        yield from rows if order is None else map(rows.__getitem__, order)


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
