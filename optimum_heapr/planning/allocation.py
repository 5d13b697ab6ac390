# Licensed under the Apache License, Version 2.0
"""Allocation: from importance scores to the atomic experts that are kept.

Within an expert atomic experts are ranked by importance and cut into groups of `width_multiple`; groups, not single
atomic experts, are then ranked across experts. So widths come out as multiples because of what they are worth, and
nothing is rounded afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..utils.errors import HeaprError
from .alignment import effective_multiple, uniform_width
from .errors import UnreachableRatio
from .goal import Goal
from .protection import protected_experts


if TYPE_CHECKING:
    from ..configuration import HeaprConfig


Kept = dict[str, list[torch.Tensor]]

_ROUNDING = 1e-6  # of a count that was a share, in double precision; far less than any share of one more


def allocate(
    scores: dict[str, torch.Tensor],
    config: HeaprConfig,
    unreached: dict[str, list[int]],
    goal: Goal | None = None,
    dropped: dict[str, list[int]] | None = None,
) -> Kept:
    """Chooses what stays.

    Args:
        scores (`dict[str, torch.Tensor]`): importance by block, [E, I]; higher is kept, ties by lowest index.
        config (`HeaprConfig`): all but its calibration part is used.
        unreached (`dict[str, list[int]]`): experts that no calibration token reached, by block.
        goal (`Goal`, *optional*): how much goes; by default the ratio of the config.
        dropped (`dict[str, list[int]]`, *optional*): experts that keep nothing, by block; the allocation is `uniform` then.

    Returns:
        `dict[str, list[torch.Tensor]]`: for each block and expert the kept indices, ascending, int64. What a ratio asks for
        is removed to the nearest atomic expert (of each expert, if uniform), or less by what a group holds back. A goal
        that is a bound is kept: more goes by what a group takes with it.

    Raises:
        HeaprError: if the goal cannot be reached under `width_multiple`, `min_width` or protection; the message names
            what can.
    """
    goal = goal or Goal.of_ratio(config)
    multiple = effective_multiple(config, [score.shape[1] for score in scores.values()])
    config = replace(config, width_multiple=multiple)
    _check(scores, config)
    protected = protected_experts(config, {path: len(score) for path, score in scores.items()})
    ranked = {}
    for path, score in scores.items():
        whole = protected.get(path, []) + (unreached.get(path, []) if config.protect_unreached else [])
        ranked[path] = _RankedBlock.rank(score, config, whole)
    if config.allocation == "uniform":
        for path, block in ranked.items():
            gone = (dropped or {}).get(path, [])
            block.keep_groups(_uniform_groups(block, config, goal, len(gone)))
            block.stays[gone] = False
    elif config.allocation == "layer":
        cut = [block for path, block in ranked.items() if len(protected.get(path, [])) < len(block.value)]
        for block in cut:
            _remove_least([block], config, goal)
        if all(bool(block.stays.all()) for block in ranked.values()):
            raise HeaprError(f"protect={config.protect!r}: leaves nothing to remove; protect less")
    else:
        _remove_least(list(ranked.values()), config, goal)
    return {path: block.kept_indices() for path, block in ranked.items()}


@dataclass
class _RankedBlock:
    """One block's atomic experts in groups, the best first within each expert; groups of one are as they come.

    There are as many of these as the model has layers: nothing here is larger than it must be.
    """

    order: torch.Tensor | None  # [E, I]: indices of atomic experts, best first
    value: torch.Tensor  # [E, G]: mean importance of each group; where there is an order, falling along G
    size: torch.Tensor  # [G]: atomic experts in a group; the last may be smaller
    fixed: torch.Tensor  # [E, G]: groups that must stay
    stays: torch.Tensor  # [E, G]: groups that do

    @classmethod
    def rank(cls, score: torch.Tensor, config: HeaprConfig, protected: list[int]) -> _RankedBlock:
        (experts, width), multiple = score.shape, config.width_multiple
        order, value = None, score.double()
        if multiple > 1 or config.min_width or config.allocation == "uniform":
            value, order = torch.sort(value, dim=1, descending=True, stable=True)
            order = order.to(torch.int16 if width < 2**15 else torch.int64)
        starts = torch.arange(0, width, multiple)
        size = (starts + multiple).clamp(max=width) - starts
        if multiple > 1:
            group_of = torch.arange(width) // multiple
            value = torch.zeros(experts, len(size), dtype=torch.float64).index_add_(1, group_of, value) / size
            # A mean is not exactly monotone in floating point; the running minimum keeps best groups first.
            value = value.cummin(dim=1).values
        fixed = torch.zeros(value.shape, dtype=torch.bool)
        fixed[:, : -(-config.min_width // multiple)] = True
        fixed[protected] = True
        return cls(order, value, size, fixed, torch.ones_like(fixed))

    def keep_groups(self, count: int) -> None:
        """Keeps the first groups of each expert and no others."""
        self.stays[:, count:] = False

    def kept_indices(self) -> list[torch.Tensor]:
        """Ascending indices of what stays, of each expert."""
        stays = self.stays
        if self.order is not None:
            ranked = stays.repeat_interleave(self.size, dim=1)
            stays = torch.zeros_like(ranked).scatter_(1, self.order.long(), ranked)
        indices = stays.flatten().nonzero().squeeze(1) % stays.shape[1]
        return list(indices.split(stays.sum(1).tolist()))


def _remove_least(blocks: list[_RankedBlock], config: HeaprConfig, goal: Goal) -> None:
    """Removes the least important groups of all `blocks`."""
    total = sum(len(block.value) * int(block.size.sum()) for block in blocks)
    budget = math.ceil(goal.ratio * total - _ROUNDING) if goal.is_bound else round(goal.ratio * total)
    removable = sum(int((~block.fixed * block.size).sum()) for block in blocks)
    if removable < budget:
        raise UnreachableRatio(
            f"{goal.asked}: min_width={config.min_width}, protect={config.protect!r} and "
            f"protect_unreached={config.protect_unreached} leave only {removable / total:.4f} to remove; ask for less or "
            "protect less",
            removable / total,
        )
    value = torch.cat([block.value.masked_fill(block.fixed, torch.inf).flatten() for block in blocks])
    threshold, at_threshold = _threshold(value, blocks, budget, goal.is_bound)
    del value
    if threshold is None:
        raise UnreachableRatio(
            f"{goal.asked}: removes less than one group of width_multiple={config.width_multiple} atomic experts; "
            "raise ratio or lower width_multiple",
            max(int(block.size.max()) for block in blocks) / total,
        )
    for block in reversed(blocks):  # of equal ones the lower index stays
        equal = ((block.value == threshold) & ~block.fixed).flatten().nonzero().squeeze(1)
        last = equal[max(len(equal) - at_threshold, 0) :]
        at_threshold -= len(last)
        block.stays = (block.value >= threshold) | block.fixed
        block.stays.view(-1)[last] = False


def _threshold(
    value: torch.Tensor, blocks: list[_RankedBlock], budget: int, is_least: bool
) -> tuple[float | None, int]:
    """The largest value of a group that goes, and how many of that value do; overwrites `value`, [groups] of all blocks.

    Groups go up to the budget, or if that is the least that goes, up to the one that reaches it.
    """
    sizes = torch.cat([block.size for block in blocks]).unique()
    if len(sizes) == 1:
        count = -(-budget // int(sizes)) if is_least else budget // int(sizes)
        if count:
            value.numpy().partition(count - 1)  # a selection: sorting it all takes several times as long, and memory
            value = value[:count]
    else:
        size = torch.cat([block.size.expand_as(block.value).flatten() for block in blocks])
        # A stable sort keeps the lower index first among equals, so removal from the end takes the higher one.
        order = torch.sort(value, descending=True, stable=True).indices.flip(0)
        gone = size[order].cumsum(0)
        count = int((gone < budget).sum()) + 1 if is_least else int((gone <= budget).sum())
        value = value[order[:count]]
    if count == 0:
        return None, 0
    threshold = value.max()
    return float(threshold), int((value == threshold).sum())


def _uniform_groups(block: _RankedBlock, config: HeaprConfig, goal: Goal, dropped: int) -> int:
    """The same number of groups for every expert that stays: the fewest that hold the width nearest to a ratio, the most within
    a bound."""
    groups, width, multiple = len(block.size), int(block.size.sum()), config.width_multiple
    experts = len(block.value)
    share = 1 - dropped / experts
    if goal.is_bound:
        wanted = math.floor((1 - goal.ratio) * width / share + _ROUNDING)
        keep = wanted // multiple
    else:
        wanted = uniform_width(config, width, share)
        keep = -(-wanted // multiple)
    if dropped and wanted > width and not goal.is_bound:
        least = math.ceil((1 - goal.ratio) * experts)
        raise UnreachableRatio(
            f"num_experts={experts - dropped}: {goal.asked} leaves {wanted} atomic experts for each, and they have {width}; "
            f"keep at least {least} experts, or remove more",
            1 - share,
        )
    if keep * multiple >= width:
        if dropped:
            return groups
        below = (groups - 1) * multiple
        hint = f"the smallest possible ratio is {1 - below / width:.4f}" if below else "lower width_multiple"
        raise UnreachableRatio(
            f"{goal.asked}: no multiple of {multiple} below the width {width} fits; {hint}",
            *([1 - below / width] if below else ()),
        )
    if keep == 0:
        least = min(multiple, width) if goal.is_bound else 1
        largest = 1 - share * least / width
        raise UnreachableRatio(
            f"{goal.asked}: leaves fewer than {least} of {width} atomic experts; the largest ratio is {largest:.4f}",
            largest,
        )
    if keep * multiple < config.min_width:
        raise UnreachableRatio(
            f"min_width={config.min_width}: {goal.asked} leaves width {keep * multiple}; lower one",
            1 - -(-config.min_width // multiple) * multiple * share / width,
        )
    return keep


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
