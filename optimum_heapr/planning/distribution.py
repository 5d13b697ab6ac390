# Licensed under the Apache License, Version 2.0
"""How importance is distributed over the atomic experts, and where a plan cuts: a histogram that fits into a report."""

from __future__ import annotations

import math
from typing import Any

import torch


BINS = 60
_DECADES = 2  # from this span on the axis is logarithmic


def importance_distribution(scores: dict[str, torch.Tensor], kept: dict[str, list[torch.Tensor]]) -> dict[str, Any]:
    """Histogram of all scores, apart for what stays and what goes.

    Args:
        scores (`dict[str, torch.Tensor]`): importance by block, [E, I].
        kept (`dict[str, list[torch.Tensor]]`): what stays, as in `PruningPlan`.

    Returns:
        `dict`: plain JSON types: `scale` (`log` or `linear`), `edges` (`BINS + 1` importances; none if there is nothing to
        show), `kept` and `removed` (counts by bin), `below` (`[kept, removed]`: what a logarithmic axis cannot show,
        scores of 0 and, of experts that were not measured, below), and `cut`: the highest score that goes, `None` where
        more important ones stay than go below it, as each layer or expert has a cut of its own then.
    """
    values = torch.cat([score.double().flatten() for score in scores.values()])
    stays = torch.cat([_mask(score, kept[path]) for path, score in scores.items()])
    positive = values[values > 0]
    is_log = len(positive) > 0 and float(positive.max() / positive.min()) > 10**_DECADES
    shown = values > 0 if is_log else values.isfinite()
    axis = values[shown].log10() if is_log else values[shown]
    result = {
        "scale": "log" if is_log else "linear",
        "edges": [],
        "kept": [],
        "removed": [],
        "below": [int((stays & ~shown).sum()), int((~stays & ~shown).sum())],
        "cut": _cut(values, stays),
    }
    if len(axis) == 0:
        return result
    low, high = float(axis.min()), float(axis.max())
    if is_log and high - low > 12:
        low = high - 12  # a few scores next to nothing would leave the rest no room
    high = high if high > low else low + 1
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    bins = ((axis.clamp(low, high) - low) / (high - low) * BINS).long().clamp(max=BINS - 1)
    for name, chosen in (("kept", stays[shown]), ("removed", ~stays[shown])):
        result[name] = torch.bincount(bins[chosen], minlength=BINS).tolist()
    result["edges"] = [float(f"{10**edge if is_log else edge:.6g}") for edge in edges.tolist()]
    return result


def _mask(score: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for expert, indices in enumerate(kept):
        mask[expert, indices] = True
    return mask.flatten()


def _cut(values: torch.Tensor, stays: torch.Tensor) -> float | None:
    """The score that parts what goes from what stays, if one does but for groups, ties and protected experts."""
    removed, kept = values[~stays], values[stays]
    if len(removed) == 0 or len(kept) == 0:
        return None
    threshold = values.sort().values[len(removed) - 1].item()
    crossed = int((removed > threshold).sum())
    if not math.isfinite(threshold) or crossed > 0.05 * len(removed):
        return None
    return float(f"{threshold:.6g}")
