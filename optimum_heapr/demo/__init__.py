# Licensed under the Apache License, Version 2.0
"""The embedded demo model and its texts: everything needed to try the package without any download.

The model is a small Qwen3-MoE, trained from scratch by `recipes/demo/train.py` on the sources and the help texts of
the Python standard library. The texts themselves are not shipped: they are read from the running Python.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..utils.errors import HeaprError, did_you_mean


__all__ = ["DEMO_MODEL", "DEMO_SPLITS", "demo_model_path", "demo_texts"]

DEMO_MODEL = "demo"
"""The name that stands for the embedded model wherever a model name or path is expected."""

DEMO_SPLITS = ("calibration", "evaluation", "train")
"""The disjoint splits of `demo_texts`."""

_SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo")
)
_BUCKETS = 20
_EVALUATION_BUCKETS = range(0, 1)
_CALIBRATION_BUCKETS = range(1, 4)
# The two small splits stop at this many characters, and take no more than the beginning of a long document, so that no
# single module dominates them.
_SMALL_SPLIT_CHARS = 400_000
_SMALL_SPLIT_DOCUMENT_CHARS = 10_000
_MIN_DOCUMENT_CHARS = 200
# A complete standard library has several hundred modules: far fewer mean that the sources were stripped.
_MIN_MODULES = 100


def demo_model_path() -> Path:
    """Return the folder with the files of the embedded demo model.

    Returns:
        `Path`: a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` can load.
    """
    return Path(__file__).resolve().parent / "model"


def demo_texts(split: str) -> list[str]:
    """Return documents from the standard library of the running Python: help texts (prose) and module sources.

    A document belongs to exactly one split, chosen by a checksum of its name (a module's path inside the standard
    library, or a help topic's name), so that the splits have no module in common; a module that keeps its path is in
    the same split under every Python version. The result is the same for every call under the same Python.

    Args:
        split (`str`): `"calibration"` or `"evaluation"` (at most 400,000 characters each), or `"train"` (several
            million characters).

    Returns:
        `list[str]`: the documents, prose and code mixed.

    Raises:
        HeaprError: if `split` is unknown, or if the sources of the standard library are not installed.
    """
    if split not in DEMO_SPLITS:
        raise HeaprError(f"split={split!r}: use one of {', '.join(DEMO_SPLITS)}{did_you_mean(split, DEMO_SPLITS)}")
    return list(_texts(split))


@cache
def _texts(split: str) -> tuple[str, ...]:
    """The documents of a split: a run asks for them up to three times, and hundreds of files are read for each."""
    documents = list(_documents(split))
    # Checksum order mixes prose and code, and makes the first characters of a split a fair sample of it.
    documents.sort(key=lambda document: (_checksum("order:" + document[0]), document[0]))
    texts = [text for _, text in documents]
    return tuple(texts if split == "train" else _capped(texts))


def _documents(split: str) -> Iterator[tuple[str, str]]:
    """Yield `(name, text)` of every document of a split; only those are read."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = list(_modules(stdlib))
    if len(modules) < _MIN_MODULES:
        raise HeaprError(
            f"dataset='demo': its texts are the sources of the Python standard library, but {stdlib} holds only "
            f"{len(modules)} of them; use a Python installed with its sources, or name another dataset"
        )
    for name in modules:
        if _split_of(name) != split:
            continue
        try:
            text = (stdlib / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= _MIN_DOCUMENT_CHARS:
            yield name, text
    yield from (topic for topic in _help_topics() if _split_of(topic[0]) == split)


def _modules(stdlib: Path) -> Iterator[str]:
    """Yield the path inside the standard library of every module of it, and of no data written as Python source."""
    for folder, folders, files in os.walk(stdlib):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]  # may hold thousands of files
        for file in files:
            name = Path(folder, file).relative_to(stdlib).as_posix()
            # The help topics are read as texts; the build configuration holds the paths of the machine that built Python.
            if file.endswith(".py") and name != "pydoc_data/topics.py" and not file.startswith("_sysconfigdata"):
                yield name


def _help_topics() -> Iterator[tuple[str, str]]:
    """Yield the topics of `help()`, chapters of the language reference."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately; the module sources are enough
        return
    # Topics quote one another's sections at length. Each paragraph is kept in one topic only, or the splits would
    # share text.
    seen: set[str] = set()
    for name, text in sorted(topics.items()):
        paragraphs = []
        for paragraph in text.strip().split("\n\n"):
            key = " ".join(paragraph.split())
            if key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        document = "\n\n".join(paragraphs) + "\n"
        if len(document) >= _MIN_DOCUMENT_CHARS:
            yield f"pydoc_data/topics/{name}", document


def _checksum(name: str) -> int:
    # Not `hash`, which differs between processes.
    return zlib.crc32(name.encode("utf-8"))


def _split_of(name: str) -> str:
    bucket = _checksum(name) % _BUCKETS
    if bucket in _EVALUATION_BUCKETS:
        return "evaluation"
    return "calibration" if bucket in _CALIBRATION_BUCKETS else "train"


def _capped(texts: list[str]) -> list[str]:
    """Cut long documents to their beginning, and the list to the total size of a small split."""
    capped, room = [], _SMALL_SPLIT_CHARS
    for text in texts:
        text = text[: min(_SMALL_SPLIT_DOCUMENT_CHARS, room)]
        if len(text) < _MIN_DOCUMENT_CHARS:
            if room < _MIN_DOCUMENT_CHARS:
                break
            continue
        capped.append(text)
        room -= len(text)
    return capped
