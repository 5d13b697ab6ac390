# Licensed under the Apache License, Version 2.0
"""Whether a model can be pruned in the way that a config asks for, before anything is spent on measuring it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..calibration.statistics import AtomicStatistics, BlockStatistics
from ..experts import find_expert_blocks, model_name
from ..fingerprint import model_fingerprint, storage_of
from ..planning.alignment import effective_multiple
from ..planning.allocation import Kept, allocate
from ..planning.dropping import dropped_experts
from ..planning.errors import UnreachableRatio
from ..planning.goal import Goal
from ..planning.rectangles import rectangles
from ..utils.errors import HeaprError
from .block_compensation import check_block_memory
from .stock import find_stock_layout


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..configuration import HeaprConfig
    from ..experts import ExpertBlock


def check_feasible(model: PreTrainedModel, config: HeaprConfig) -> None:
    """Refuses a layout, an alignment, a uniform ratio or a protection that a model cannot have, and fits without room.

    Args:
        model (`PreTrainedModel`): only shapes are read.
        config (`HeaprConfig`): its planning part is used, and of its calibration part how much text there will be.

    Raises:
        HeaprError: naming what is possible.
    """
    blocks = find_expert_blocks(model)
    _check_allocation(model, blocks, config)
    if config.compensates_blocks:
        check_block_memory(model, blocks, config)
    if config.layout == "uniform":
        experts = None if config.num_experts in (None, "auto") else int(config.num_experts)
        find_stock_layout(model, blocks, max(blocks[0].width // 2, 1), experts)  # any width but the present one
    if config.layout == "variable":
        check_family(model)


def width_ahead(model: PreTrainedModel, config: HeaprConfig) -> tuple[int, bool]:
    """The one width that all experts will keep in a stock layout, before anything is measured.

    Args:
        model (`PreTrainedModel`): only shapes are read.
        config (`HeaprConfig`): its planning part is used.

    Returns:
        `tuple[int, bool]`: the width and `True`, or, where that takes measuring, what it will be a multiple of and `False`.

    Raises:
        HeaprError: as [`check_feasible`].
    """
    blocks = find_expert_blocks(model)
    kept = _check_allocation(model, blocks, config)
    if kept is not None and config.layout == "uniform" and config.num_experts != "auto":
        return max(len(one) for experts in kept.values() for one in experts), True
    return effective_multiple(config, [block.width for block in blocks]), False


def _check_allocation(model: PreTrainedModel, blocks: list[ExpertBlock], config: HeaprConfig) -> Kept | None:
    """Allocates as if all had been measured and were of one worth: what is refused then, is refused whatever is measured.

    Returns:
        `dict` or `None`: what would stay; nothing where the ratio is searched for.
    """
    statistics = AtomicStatistics(
        {block.path: _as_if_measured(block) for block in blocks},
        {"model": model_fingerprint(model, blocks), "storage": storage_of(model, blocks)},
    )
    searched = config.max_loss_increase is not None
    config = config.replace(ratio=0.5) if searched else config
    if config.num_experts == "auto":
        *_, config = rectangles(statistics, config).values()
    dropped = dropped_experts(statistics, config, {block.path: torch.zeros(block.num_experts) for block in blocks})
    goal = Goal.of(config, statistics)
    multiple = effective_multiple(config, [block.width for block in blocks])
    # Where widths differ, groups that are cut short may go first: with real scores they might.
    scores = {
        block.path: torch.full((block.num_experts, block.width), float(block.width % multiple or multiple))
        for block in blocks
    }
    try:
        kept = allocate(scores, config, {}, goal, dropped)
    except UnreachableRatio as error:
        if not (searched and error.nearest):  # a search finds its ratio
            raise
    return None if searched else kept


def _as_if_measured(block: ExpertBlock) -> BlockStatistics:
    one = torch.ones(()).expand(block.num_experts, block.width)
    return BlockStatistics(one, one, one, one, torch.ones(block.num_experts, dtype=torch.int64))


def check_family(model: PreTrainedModel) -> None:
    """Refuses variable widths for a model of transformers whose experts are those of a model of another family within it.

    How checkpoints of that family are read would then have to be known to two model types, which transformers joins anew.

    Raises:
        HeaprError: naming the model type.
    """
    from ..modeling.auto import is_family

    model_type = type(model.config).model_type
    if type(model.config).__module__.startswith("transformers.") and not is_family(model_type):
        raise HeaprError(
            f"model={model_name(model)!r}: model type {model_type!r} has no experts of its own, they belong to a model of "
            "another family in it; variable widths need one of `optimum-cli heapr families`, so use layout='uniform' or "
            "prune that model alone"
        )
