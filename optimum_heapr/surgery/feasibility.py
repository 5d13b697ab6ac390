# Licensed under the Apache License, Version 2.0
"""Whether a model can be pruned in the way that a config asks for, before anything is spent on measuring it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..experts import find_expert_blocks, model_name
from ..planning.alignment import check_uniform_width, effective_multiple
from ..planning.protection import protected_experts
from ..utils.errors import HeaprError
from .block_compensation import check_block_memory
from .stock import find_stock_layout


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..configuration import HeaprConfig


def check_feasible(model: PreTrainedModel, config: HeaprConfig) -> None:
    """Refuses a layout, an alignment, a uniform ratio or a protection that a model cannot have, and fits without room.

    Args:
        model (`PreTrainedModel`): only shapes are read.
        config (`HeaprConfig`): its planning part is used, and of its calibration part how much text there will be.

    Raises:
        HeaprError: naming what is possible.
    """
    blocks = find_expert_blocks(model)
    effective_multiple(config, [block.width for block in blocks])
    protected_experts(config, {block.path: block.num_experts for block in blocks})
    if config.allocation == "uniform":
        for width in {block.width for block in blocks}:
            check_uniform_width(config, width)
    if config.compensates_blocks:
        check_block_memory(model, blocks, config)
    if config.layout == "uniform":
        find_stock_layout(model, blocks, max(blocks[0].width // 2, 1))  # any width but the present one
    if config.layout == "variable":
        check_family(model)


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
