# Licensed under the Apache License, Version 2.0
"""Adds the statistics of several calibrations of one model on different data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..fingerprint import check_same_model
from ..utils.errors import HeaprError
from .statistics import SUMMED_BY_SOURCE, AtomicStatistics, BlockStatistics


def merge_statistics(parts: Sequence[AtomicStatistics]) -> AtomicStatistics:
    """The statistics that one calibration on the data of all parts would have given, up to the order of additions.

    Args:
        parts (`Sequence[AtomicStatistics]`): of one model, in any number, each on data of its own.

    Returns:
        `AtomicStatistics`: its fingerprint lists the data of each part as `merged`.

    Raises:
        HeaprError: if there are fewer than two parts, they are of different models, seeds or sequence lengths, measured
            different things, or share their data.
    """
    if len(parts) < 2:
        raise HeaprError(f"statistics: {len(parts)} cannot be merged; name two or more")
    first, *others = parts
    for other in others:
        _check_fit(first, other)
    blocks = {path: _added(parts, path) for path in first.blocks}
    predicted = [_predicted_tokens(part) for part in parts]
    loss = sum(part.fingerprint["loss"] * count for part, count in zip(parts, predicted)) / sum(predicted)
    fingerprint = {**first.fingerprint, "data": _merged_data(parts), "loss": loss}
    fingerprint.pop("skipped", None)  # indices into the samples of one part; `merged` holds what each measured
    return AtomicStatistics(blocks, fingerprint)


def _check_fit(first: AtomicStatistics, other: AtomicStatistics) -> None:
    check_same_model(first.fingerprint["model"], other.fingerprint["model"], "statistics to merge")
    for name in ("seed", "seq_length"):
        values = first.fingerprint.get(name), other.fingerprint.get(name)
        if values[0] != values[1]:
            raise HeaprError(
                f"statistics to merge: {name} is {json.dumps(values[0])} in one and {json.dumps(values[1])} in another; "
                "calibrate again with the same options"
            )
    if list(first.blocks) != list(other.blocks):
        raise HeaprError("statistics to merge: they have different expert blocks; calibrate one model")
    for path, block in first.blocks.items():
        mine, theirs = _total(block), _total(other.blocks[path])
        for name in mine.keys() ^ theirs.keys():
            raise HeaprError(
                f"statistics to merge: {path}.{name} was measured in one and not in another; calibrate both with "
                "the same value of statistics"
            )
        for name in mine:
            if mine[name].shape != theirs[name].shape:
                raise HeaprError(
                    f"statistics to merge: {path}.{name} has shape {tuple(mine[name].shape)} in one and "
                    f"{tuple(theirs[name].shape)} in another; calibrate one model"
                )
        if block.has_curves and not block.has_grams:
            raise HeaprError(
                f"statistics to merge: those of {path} hold removal curves without the matrices that gave them; calibrate "
                "with keep_grams=True"
            )
        if not torch.allclose(block.weight_norm.float(), other.blocks[path].weight_norm.float(), rtol=1e-2):
            raise HeaprError(f"statistics to merge: the weights of {path} differ; calibrate one model")


def _total(block: BlockStatistics) -> dict[str, torch.Tensor]:
    """The sums over all sources."""
    return {name: tensor for name, tensor in block.sums.items() if not name.startswith("source_")}


def _added(parts: Sequence[AtomicStatistics], path: str) -> BlockStatistics:
    blocks = [part.blocks[path] for part in parts]
    summed = {name: sum(block.sums[name] for block in blocks) for name in _total(blocks[0])}
    # Removal curves are of one part; the sums of all give new ones.
    gone = dict.fromkeys(("removal_order", "removal_cost", "removal_ridge", "removal_scale"))
    return replace(blocks[0], **summed, **gone, **_side_by_side([part.by_source(path) for part in parts]))


def _side_by_side(parts: Sequence[Sequence[BlockStatistics] | None]) -> dict[str, torch.Tensor | None]:
    """The sums of all sources of all parts, or none if one of these, of an earlier version, has them added up."""
    if any(sources is None for sources in parts):
        return {f"source_{name}": None for name in SUMMED_BY_SOURCE}
    sources = [source for found in parts for source in found]
    return {
        f"source_{name}": torch.stack([getattr(source, name) for source in sources], dim=1)
        for name in SUMMED_BY_SOURCE
    }


def _predicted_tokens(part: AtomicStatistics) -> int:
    """All tokens but the first of each sample."""
    data = part.fingerprint["data"]
    return data["num_tokens"] - data["num_samples"]


def _merged_data(parts: Sequence[AtomicStatistics]) -> dict[str, Any]:
    merged = [data for part in parts for data in part.fingerprint["data"].get("merged", [part.fingerprint["data"]])]
    hashes = [data["sha256"] for data in merged]
    twice = next((data for data in merged if hashes.count(data["sha256"]) > 1), None)
    if twice is not None:
        raise HeaprError(
            f"statistics to merge: the data of {twice['source']!r} (sha256 {twice['sha256']}) are in two of them and would "
            "count twice; merge statistics of different data"
        )
    return {
        "source": " + ".join(data["source"] for data in merged),
        "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest()[:16],
        "num_samples": sum(data["num_samples"] for data in merged),
        "num_tokens": sum(data["num_tokens"] for data in merged),
        "sources": [source for data in merged for source in data.get("sources", [])],
        "merged": merged,
    }
