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
    stays = {path: _mask(score, kept[path]) for path, score in scores.items()}
    positive = [part.double().aminmax() for score in scores.values() if len(part := score[score > 0])]
    is_log = bool(positive) and float(max(p.max for p in positive) / min(p.min for p in positive)) > 10**_DECADES
    result = {
        "scale": "log" if is_log else "linear",
        "edges": [],
        "kept": [0] * BINS,
        "removed": [0] * BINS,
        "below": [0, 0],
        "cut": _cut(scores, stays),
    }

    # One block after another: there are millions of scores, and copies of all of them at once would add up.
    def shown(score: torch.Tensor) -> torch.Tensor:
        return score > 0 if is_log else score.isfinite()

    def axis(values: torch.Tensor) -> torch.Tensor:
        return values.double().log10() if is_log else values.double()

    extremes = [axis(part).aminmax() for score in scores.values() if len(part := score[shown(score)])]
    if not extremes:
        counts = [int(sum(mask.sum() for mask in stays.values())), int(sum((~mask).sum() for mask in stays.values()))]
        return {**result, "kept": [], "removed": [], "below": counts}
    low, high = float(min(part.min for part in extremes)), float(max(part.max for part in extremes))
    if is_log and high - low > 12:
        low = high - 12  # a few scores next to nothing would leave the rest no room
    high = high if high > low else low + 1
    for path, score in scores.items():
        for index, (name, chosen) in enumerate((("kept", stays[path]), ("removed", ~stays[path]))):
            values = score[chosen & shown(score)]
            result["below"][index] += int(chosen.sum()) - len(values)
            bins = ((axis(values).clamp(low, high) - low) / (high - low) * BINS).long().clamp(max=BINS - 1)
            counts = torch.bincount(bins, minlength=BINS).tolist()
            result[name] = [sum(pair) for pair in zip(result[name], counts)]
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist()
    result["edges"] = [float(f"{10**edge if is_log else edge:.6g}") for edge in edges]
    return result


def _mask(score: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
    mask = torch.zeros(score.shape, dtype=torch.bool)
    expert = torch.arange(len(kept)).repeat_interleave(torch.tensor([len(indices) for indices in kept]))
    mask[expert, torch.cat(kept)] = True
    return mask


def _cut(scores: dict[str, torch.Tensor], stays: dict[str, torch.Tensor]) -> float | None:
    """The score that parts what goes from what stays, if one does but for groups, ties and protected experts."""
    removed = sum(int((~mask).sum()) for mask in stays.values())
    values = torch.cat([score.double().flatten() for score in scores.values()])
    if removed in (0, len(values)):
        return None
    values.numpy().partition(removed - 1)  # in place, and several times as fast as a sort
    threshold = values[removed - 1].item()
    del values
    crossed = sum(int((score.double() > threshold)[~stays[path]].sum()) for path, score in scores.items())
    if not math.isfinite(threshold) or crossed > 0.05 * removed:
        return None
    return float(f"{threshold:.6g}")
