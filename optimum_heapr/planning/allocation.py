# Licensed under the Apache License, Version 2.0
"""Allocation: from importance scores to the atomic experts that are kept.

Within an expert atomic experts are ranked by importance and cut into groups of `width_multiple`; groups, not single
atomic experts, are then ranked across experts. So widths come out as multiples because of what they are worth, and
nothing is rounded afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..utils.errors import HeaprError
from .alignment import check_uniform_width, effective_multiple
from .protection import protected_experts


if TYPE_CHECKING:
    from ..configuration import HeaprConfig


Kept = dict[str, list[torch.Tensor]]


def allocate(scores: dict[str, torch.Tensor], config: HeaprConfig, unreached: dict[str, list[int]]) -> Kept:
    """Chooses what stays.

    Args:
        scores (`dict[str, torch.Tensor]`): importance by block, [E, I]; higher is kept, ties by lowest index.
        config (`HeaprConfig`): all but its calibration part is used.
        unreached (`dict[str, list[int]]`): experts that no calibration token reached, by block.

    Returns:
        `dict[str, list[torch.Tensor]]`: for each block and expert the kept indices, ascending, int64. What the ratio
        asks for is removed to the nearest atomic expert (of each expert, if uniform), or less by what a group holds back.

    Raises:
        HeaprError: if the ratio cannot be reached under `width_multiple`, `min_width` or protection; the message names
            what can.
    """
    multiple = effective_multiple(config, [score.shape[1] for score in scores.values()])
    config = replace(config, width_multiple=multiple)
    _check(scores, config)
    protected = protected_experts(config, {path: len(score) for path, score in scores.items()})
    ranked = {}
    for path, score in scores.items():
        whole = protected.get(path, []) + (unreached.get(path, []) if config.protect_unreached else [])
        ranked[path] = _RankedBlock.rank(score, config, whole)
    if config.allocation == "uniform":
        groups = {path: _uniform_groups(block, config) for path, block in ranked.items()}
    elif config.allocation == "layer":
        groups = {
            path: torch.full((len(block.value),), len(block.size))
            if len(protected.get(path, [])) == len(block.value)
            else _remove_least([block], config)[0]
            for path, block in ranked.items()
        }
        if all(bool((groups[path] == len(block.size)).all()) for path, block in ranked.items()):
            raise HeaprError(f"protect={config.protect!r}: leaves nothing to remove; protect less")
    else:
        groups = dict(zip(ranked, _remove_least(list(ranked.values()), config)))
    return {path: block.kept_indices(groups[path]) for path, block in ranked.items()}


@dataclass
class _RankedBlock:
    """One block's atomic experts, best first within each expert, and their groups."""

    order: torch.Tensor  # [E, I]: indices of atomic experts, best first
    value: torch.Tensor  # [E, G]: mean importance of each group, falling along G; inf where a group must stay
    size: torch.Tensor  # [G]: atomic experts in a group; the last may be smaller

    @classmethod
    def rank(cls, score: torch.Tensor, config: HeaprConfig, protected: list[int]) -> _RankedBlock:
        experts, width = score.shape
        ordered, order = torch.sort(score.double(), dim=1, descending=True, stable=True)
        starts = torch.arange(0, width, config.width_multiple)
        size = (starts + config.width_multiple).clamp(max=width) - starts
        group_of = torch.arange(width) // config.width_multiple
        value = torch.zeros(experts, len(size), dtype=torch.float64).index_add_(1, group_of, ordered) / size
        # A mean is not exactly monotone in floating point; the running minimum keeps best groups first.
        value = value.cummin(dim=1).values
        value[:, : -(-config.min_width // config.width_multiple)] = torch.inf
        value[protected] = torch.inf
        return cls(order, value, size)

    def kept_indices(self, groups: torch.Tensor) -> list[torch.Tensor]:
        """Ascending indices of the first `groups[e]` groups of each expert e."""
        widths = torch.cat([torch.zeros(1, dtype=torch.int64), self.size.cumsum(0)])[groups].tolist()
        return [order[:width].sort().values for order, width in zip(self.order, widths)]


def _remove_least(blocks: list[_RankedBlock], config: HeaprConfig) -> list[torch.Tensor]:
    """How many groups of each expert stay when the least important ones of all `blocks` go: a list of [E]."""
    value = torch.cat([block.value.flatten() for block in blocks])
    size = torch.cat([block.size.expand_as(block.value).flatten() for block in blocks])
    total = int(size.sum())
    budget = round(config.ratio * total)
    removable = int(size[~value.isinf()].sum())
    if removable < budget:
        raise HeaprError(
            f"ratio={config.ratio}: min_width={config.min_width}, protect={config.protect!r} and "
            f"protect_unreached={config.protect_unreached} leave only {removable / total:.4f} to remove; ask for less or "
            "protect less"
        )
    # A stable sort keeps the lower index first among equals, so removal from the end takes the higher one.
    order = torch.sort(value, descending=True, stable=True).indices.flip(0)
    removed = order[size[order].cumsum(0) <= budget]
    if len(removed) == 0:
        raise HeaprError(
            f"ratio={config.ratio}: removes less than one group of width_multiple={config.width_multiple} atomic experts; "
            "raise ratio or lower width_multiple"
        )
    kept = torch.ones_like(value, dtype=torch.int64)
    kept[removed] = 0
    parts = kept.split([block.value.numel() for block in blocks])
    return [part.view_as(block.value).sum(1) for part, block in zip(parts, blocks)]


def _uniform_groups(block: _RankedBlock, config: HeaprConfig) -> torch.Tensor:
    """The same number of groups for every expert, the fewest that hold the width nearest to the ratio: [E]."""
    experts, groups = block.value.shape
    width, multiple = int(block.size.sum()), config.width_multiple
    check_uniform_width(config, width)
    keep = -(-round((1 - config.ratio) * width) // multiple)
    if keep * multiple >= width:
        below = (groups - 1) * multiple
        hint = f"the smallest possible ratio is {1 - below / width:.4f}" if below else "lower width_multiple"
        raise HeaprError(f"ratio={config.ratio}: no multiple of {multiple} below the width {width} fits; {hint}")
    if keep == 0:
        raise HeaprError(
            f"ratio={config.ratio}: leaves no atomic expert of {width}; the largest is {1 - 1 / width:.4f}"
        )
    if keep * multiple < config.min_width:
        raise HeaprError(
            f"min_width={config.min_width}: ratio={config.ratio} leaves width {keep * multiple}; lower one"
        )
    return torch.full((experts,), keep)


def _check(scores: dict[str, torch.Tensor], config: HeaprConfig) -> None:
    for path, score in scores.items():
        if not torch.isfinite(score).all():
            raise HeaprError(f"scores of {path}: not finite; calibrate again in bfloat16 or float32")
        width = score.shape[1]
        for name in ("width_multiple", "min_width"):
            if getattr(config, name) > width:
                raise HeaprError(f"{name}={getattr(config, name)}: must be at most {width}, the width of an expert")
    if config.allocation == "uniform" and config.protect_unreached:
        raise HeaprError(
            "protect_unreached=True: allocation='uniform' gives every expert the same width; use global or layer"
        )
