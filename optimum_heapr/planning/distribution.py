# Licensed under the Apache License, Version 2.0
"""How importance is distributed over the atomic experts, and where a plan cuts: a histogram that fits into a report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from .selection import least_reaching


BINS = 60
_DECADES = 2  # from this span on the axis is logarithmic


def importance_distribution(scores: dict[str, torch.Tensor], stays: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Histogram of all scores, apart for what stays and what goes.

    Args:
        scores (`dict[str, torch.Tensor]`): importance by block, [E, I].
        stays (`dict[str, torch.Tensor]`): by block which of them stay, bool [E, I].

    Returns:
        `dict`: plain JSON types: `scale` (`log` or `linear`), `edges` (`BINS + 1` importances; none if there is nothing to
        show), `kept` and `removed` (counts by bin), `below` (`[kept, removed]`: what a logarithmic axis cannot show,
        scores of 0 and, of experts that were not measured, below), and `cut`: the highest score that goes, `None` where
        more important ones stay than go below it, as each layer or expert has a cut of its own then.
    """
    # One block after another, and each as it is: there are millions of scores, and copies of them all at once would add up, as would
    # the holes that pieces of many sizes leave in memory.
    least, most = _extremes((score.double(), score > 0) for score in scores.values())
    is_log = most > 0 and most / least > 10**_DECADES

    def shown(score: torch.Tensor) -> torch.Tensor:
        return score > 0 if is_log else score.isfinite()

    def axis(score: torch.Tensor) -> torch.Tensor:
        return score.double().log10() if is_log else score.double()

    scale, cut = "log" if is_log else "linear", _cut(scores, stays)
    low, high = _extremes((axis(score), shown(score)) for score in scores.values())
    if low > high:
        kept = sum(int(mask.sum()) for mask in stays.values())
        below = [kept, sum(mask.numel() for mask in stays.values()) - kept]
        return {"scale": scale, "edges": [], "kept": [], "removed": [], "below": below, "cut": cut}
    if is_log and high - low > 12:
        low = high - 12  # a few scores next to nothing would leave the rest no room
    high = high if high > low else low + 1
    counts = torch.zeros(2, BINS + 1, dtype=torch.int64)  # what stays and what goes; not shown is the last
    for path, score in scores.items():
        place = ((axis(score).clamp(low, high) - low) / (high - low) * BINS).clamp(max=BINS - 1)
        place = place.where(shown(score), BINS).long() + (BINS + 1) * ~stays[path]
        counts += torch.bincount(place.flatten(), minlength=counts.numel()).view_as(counts)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist()
    return {
        "scale": scale,
        "edges": [float(f"{10**edge if is_log else edge:.6g}") for edge in edges],
        **{name: of[:BINS].tolist() for name, of in zip(("kept", "removed"), counts)},
        "below": counts[:, BINS].tolist(),
        "cut": cut,
    }


def _extremes(parts: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """The least and the largest of values where a mask says so, both of a shape; of none the first is infinite, the second minus that."""
    found = [
        (float(values.where(mask, math.inf).min()), float(values.where(mask, -math.inf).max()))
        for values, mask in parts
    ]
    return min(low for low, _ in found), max(high for _, high in found)


def _cut(scores: dict[str, torch.Tensor], stays: dict[str, torch.Tensor]) -> float | None:
    """The score that parts what goes from what stays, if one does but for groups, ties and protected experts."""
    removed = sum(int((~mask).sum()) for mask in stays.values())
    if removed in (0, sum(mask.numel() for mask in stays.values())):
        return None
    threshold, _ = least_reaching(lambda: ((score, None) for score in scores.values()), removed)
    crossed = sum(int(((score.double() > threshold) & ~stays[path]).sum()) for path, score in scores.items())
    if not math.isfinite(threshold) or crossed > 0.05 * removed:
        return None
    return float(f"{threshold:.6g}")
