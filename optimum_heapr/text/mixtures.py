# Licensed under the Apache License, Version 2.0
"""Several sources of text written as one string, and how many samples each gives."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..utils.errors import HeaprError


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
