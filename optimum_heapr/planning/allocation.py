# Licensed under the Apache License, Version 2.0
"""Allocation: from importance scores to the atomic experts that are kept.

Within an expert atomic experts are ranked by importance and cut into groups of `width_multiple`; groups, not single
atomic experts, are then ranked across experts. So widths come out as multiples because of what they are worth, and
nothing is rounded afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..utils.errors import HeaprError
from ..utils.scratch import in_one_piece
from .alignment import effective_multiple, uniform_width
from .errors import UnreachableRatio
from .goal import Goal
from .protection import protected_experts
from .selection import least_reaching


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
    """Chooses what stays; arguments and errors as of `choose`.

    Returns:
        `dict[str, list[torch.Tensor]]`: for each block and expert the kept indices, ascending, int64.
    """
    stays = choose(scores, config, unreached, goal, dropped)
    return {path: indices_of(mask) for path, mask in stays.items()}


def indices_of(stays: torch.Tensor) -> list[torch.Tensor]:
    """Of what stays, bool [E, I], the ascending indices of each expert, int64."""
    indices = stays.flatten().nonzero().squeeze(1).remainder_(stays.shape[1])
    return list(indices.split(stays.sum(1).tolist()))


def choose(
    scores: dict[str, torch.Tensor],
    config: HeaprConfig,
    unreached: dict[str, list[int]],
    goal: Goal | None = None,
    dropped: dict[str, list[int]] | None = None,
) -> dict[str, torch.Tensor]:
    """Chooses what stays.

    Args:
        scores (`dict[str, torch.Tensor]`): importance by block, [E, I]; higher is kept, ties by lowest index.
        config (`HeaprConfig`): all but its calibration part is used.
        unreached (`dict[str, list[int]]`): experts that no calibration token reached, by block.
        goal (`Goal`, *optional*): how much goes; by default the ratio of the config.
        dropped (`dict[str, list[int]]`, *optional*): experts that keep nothing, by block; the allocation is `uniform` then.

    Returns:
        `dict[str, torch.Tensor]`: by block which atomic experts stay, bool [E, I]. What a ratio asks for is removed to the
        nearest atomic expert (of each expert, if uniform), or less by what a group holds back. A goal that is a bound is kept:
        more goes by what a group takes with it.

    Raises:
        HeaprError: if the goal cannot be reached under `width_multiple`, `min_width` or protection; the message names
            what can.
    """
    goal = goal or Goal.of_ratio(config)
    multiple = effective_multiple(config, [score.shape[1] for score in scores.values()])
    config = replace(config, width_multiple=multiple)
    _check(scores, config)
    protected = protected_experts(config, {path: len(score) for path, score in scores.items()})

    blocks = dict(zip(scores, _RankedBlock.all_of(list(scores.values()), config)))
    for path, block in blocks.items():
        whole = protected.get(path, []) + (unreached.get(path, []) if config.protect_unreached else [])
        block.rank(scores[path], config, whole)
    if config.allocation == "uniform":
        for path, block in blocks.items():
            gone = (dropped or {}).get(path, [])
            block.keep_groups(_uniform_groups(block, config, goal, len(gone)))
            block.stays[gone] = False
    elif config.allocation == "layer":
        cut = [block for path, block in blocks.items() if len(protected.get(path, [])) < len(block.stays)]
        for block in cut:
            _remove_least([block], config, goal)
        if all(bool(block.stays.all()) for block in blocks.values()):
            raise HeaprError(f"protect={config.protect!r}: leaves nothing to remove; protect less")
    else:
        _remove_least(list(blocks.values()), config, goal)
    return {path: block.mask() for path, block in blocks.items()}


@dataclass
class _RankedBlock:
    """One block's atomic experts in groups, the best first within each expert; groups of one are as they come.

    There are as many of these as the model has layers: nothing here is larger than it must be.
    """

    order: torch.Tensor | None  # [E, I]: indices of atomic experts, best first
    value: torch.Tensor | None  # [E, G]: mean importance of each group, falling along an order; None if uniform
    size: torch.Tensor  # [G]: atomic experts in a group; the last may be smaller
    fixed: torch.Tensor  # [E, G]: groups that must stay
    stays: torch.Tensor  # [E, G]: groups that do

    @classmethod
    def all_of(cls, scores: list[torch.Tensor], config: HeaprConfig) -> list[_RankedBlock]:
        """Blocks that are to be ranked; what they hold of one kind is one piece of memory."""
        multiple, is_uniform = config.width_multiple, config.allocation == "uniform"
        shapes = [score.shape for score in scores]
        grouped = [(experts, -(-width // multiple)) for experts, width in shapes]
        orders, values = [None] * len(scores), scores
        if multiple > 1 or is_uniform:
            widest = max(width for _, width in shapes)
            orders = in_one_piece(shapes, torch.int16 if widest < 2**15 else torch.int64)
            values = [None] * len(scores) if is_uniform else in_one_piece(grouped, torch.float64)
        sizes = [torch.arange(0, width, multiple).neg_().add_(width).clamp_(max=multiple) for _, width in shapes]
        parts = zip(orders, values, sizes, in_one_piece(grouped, torch.bool), in_one_piece(grouped, torch.bool))
        return [cls(*of_block) for of_block in parts]

    def rank(self, score: torch.Tensor, config: HeaprConfig, protected: list[int]) -> None:
        """Fills in all that follows from the importance of the atomic experts, [E, I]; everything stays so far."""
        self.stays.fill_(True)
        self.fixed.fill_(False)
        best = -(-config.min_width // config.width_multiple)  # groups of each expert that must stay
        if self.order is not None:
            ranked, order = torch.sort(score.double(), dim=1, descending=True, stable=True)
            self.order.copy_(order)
            self.fixed[:, :best] = True
            if self.value is not None:
                group_of = torch.arange(score.shape[1]) // config.width_multiple
                mean = torch.zeros_like(self.value).index_add_(1, group_of, ranked) / self.size
                # A mean is not exactly monotone in floating point; the running minimum keeps best groups first.
                self.value.copy_(mean.cummin(dim=1).values)
        elif best:
            self.fixed.scatter_(1, torch.sort(score, dim=1, descending=True, stable=True).indices[:, :best], True)
        self.fixed[protected] = True

    def keep_groups(self, count: int) -> None:
        """Keeps the first groups of each expert and no others."""
        self.stays[:, count:] = False

    def mask(self) -> torch.Tensor:
        """Which atomic experts stay, [E, I]."""
        if self.order is None:
            return self.stays
        ranked = self.stays.repeat_interleave(self.size, dim=1)
        return torch.zeros_like(ranked).scatter_(1, self.order.long(), ranked)


def _remove_least(blocks: list[_RankedBlock], config: HeaprConfig, goal: Goal) -> None:
    """Removes the least important groups of all `blocks`."""
    total = sum(len(block.stays) * int(block.size.sum()) for block in blocks)
    budget = math.ceil(goal.ratio * total - _ROUNDING) if goal.is_bound else round(goal.ratio * total)
    removable = sum(int((~block.fixed * block.size).sum()) for block in blocks)
    if removable < budget:
        raise UnreachableRatio(
            f"{goal.asked}: min_width={config.min_width}, protect={config.protect!r} and "
            f"protect_unreached={config.protect_unreached} leave only {removable / total:.4f} to remove; ask for less or "
            "protect less",
            removable / total,
        )
    is_ranked_alone = config.width_multiple == 1

    def that_may_go() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        for block in blocks:
            yield block.value.double().masked_fill(block.fixed, torch.inf), None if is_ranked_alone else block.size

    threshold, below = least_reaching(that_may_go, budget) if budget else (-torch.inf, 0)
    left, gone = budget - below, below
    for block in reversed(blocks):  # of equal ones the lower index stays
        equal = ((block.value == threshold) & ~block.fixed).flatten().nonzero().squeeze(1)
        # What goes from the end on up to each of them: up to the budget, or if that is the least that goes, until it is reached.
        sizes = block.size[equal.flip(0) % len(block.size)]
        up_to = sizes.cumsum(0)
        count = int((up_to - sizes < left).sum() if goal.is_bound else (up_to <= left).sum())
        taken = int(up_to[count - 1]) if count else 0
        left, gone = (left - taken if count == len(equal) else 0), gone + taken
        torch.ge(block.value, threshold, out=block.stays).logical_or_(block.fixed)
        block.stays.view(-1)[equal[len(equal) - count :]] = False
    if not gone:
        raise UnreachableRatio(
            f"{goal.asked}: removes less than one group of width_multiple={config.width_multiple} atomic experts; "
            "raise ratio or lower width_multiple",
            max(int(block.size.max()) for block in blocks) / total,
        )


def _uniform_groups(block: _RankedBlock, config: HeaprConfig, goal: Goal, dropped: int) -> int:
    """The same number of groups for every expert that stays: the fewest that hold the width nearest to a ratio, the most within
    a bound."""
    groups, width, multiple = len(block.size), int(block.size.sum()), config.width_multiple
    experts = len(block.stays)
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
