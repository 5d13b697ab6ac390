# Licensed under the Apache License, Version 2.0
"""Cuts a model in memory: selects the kept rows of each expert and changes the model's class, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..calibration.statistics import check_same_model, model_fingerprint
from ..experts import find_expert_blocks, model_name
from ..utils.errors import HeaprError
from ..utils.logging import progress
from .selection import packed_rows


if TYPE_CHECKING:
    from ..experts import ExpertBlock
    from ..modeling.atomic_experts import AtomicExperts
    from ..planning.plan import PruningPlan


def apply_plan(model: torch.nn.Module, plan: PruningPlan) -> torch.nn.Module:
    """Turns `model` into a pruned model, in place: a block at a time, so that memory only falls.

    Needs no calibration data and no accelerator.

    Args:
        model (`PreTrainedModel`): the model that the plan was made for.
        plan (`PruningPlan`): what stays.

    Returns:
        `PreTrainedModel`: the same object, now of the pruned class; it saves and loads like any other.

    Raises:
        HeaprError: if the plan was made for another model or does not fit its expert blocks.
    """
    cut_model(model, plan, check_plan(model, plan))
    return model


def cut_model(model: torch.nn.Module, plan: PruningPlan, blocks: list[ExpertBlock]) -> None:
    """What [`apply_plan`] does once the plan is known to fit; on a model without storage it changes shapes alone."""
    if plan.config.layout == "variable":
        _cut_to_variable(model, plan, blocks)
    else:
        from .stock import cut_to_stock

        cut_to_stock(model, plan, blocks)
    model.config.heapr_config = plan.config.to_dict()
    _forget_origin(model)


def _cut_to_variable(model: torch.nn.Module, plan: PruningPlan, blocks: list[ExpertBlock]) -> None:
    from ..modeling.auto import register_model_class
    from ..modeling.configuration_heapr import pruned_config_class
    from ..modeling.conversion import register_conversions

    for block in progress(blocks, desc="Pruning", unit="layer"):
        model.set_submodule(block.path, cut_block(block, plan.kept[block.path]))

    config = model.config
    config.__class__ = pruned_config_class(type(config))
    vars(config).pop("model_type", None)  # a loaded configuration has its own, which would hide that of the class
    config.expert_widths = plan.widths
    model.__class__ = register_model_class(type(config))
    register_conversions(type(config).model_type, not blocks[0].module.is_concatenated, blocks[0].module.has_bias)


def check_plan(model: torch.nn.Module, plan: PruningPlan) -> list[ExpertBlock]:
    """The expert blocks of `model`, if the plan was made for it.

    Raises:
        HeaprError: naming what differs.
    """
    blocks = find_expert_blocks(model)
    plan.check_shapes({block.path: (block.num_experts, block.width) for block in blocks})
    check_same_model(plan.model, model_fingerprint(model, blocks), "plan")
    offloaded = [block.path for block in blocks if block.module.down_proj.device.type == "meta"]
    if offloaded:
        raise HeaprError(
            f"model={model_name(model)!r}: {offloaded[0]} is offloaded; load it without device_map to prune it in memory"
        )
    return blocks


@torch.no_grad()
def cut_block(block: ExpertBlock, kept: list[torch.Tensor]) -> AtomicExperts:
    """A module with the kept atomic experts of one block, in the dtype and on the device of its weights.

    Args:
        block (`ExpertBlock`): experts of the unpruned model.
        kept (`list[torch.Tensor]`): kept indices of each expert, ascending.
    """
    from ..modeling.atomic_experts import AtomicExperts

    stock = block.module
    experts = AtomicExperts(stock, [len(indices) for indices in kept])
    start = 0
    for expert in experts.order:
        indices, width = kept[expert], len(kept[expert])
        rows, pairs = slice(start, start + width), slice(2 * start, 2 * (start + width))
        start += width
        experts.down_proj[rows] = packed_rows(block, "down_proj", expert, indices)
        experts.gate_up_proj[pairs] = packed_rows(block, "gate_up_proj", expert, indices)
        if stock.has_bias:
            experts.gate_up_proj_bias[pairs] = packed_rows(block, "gate_up_proj_bias", expert, indices)
    if stock.has_bias:
        experts.down_proj_bias.copy_(stock.down_proj_bias)
    experts.requires_grad_(stock.down_proj.requires_grad)
    if hasattr(stock, "_hf_hook"):  # the model is spread over devices: inputs go on being brought to the weights
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(experts, stock._hf_hook)
    return experts


def _forget_origin(model: torch.nn.Module) -> None:
    """Removes what described the unpruned checkpoint and would be wrong in the pruned one."""
    for name in ("_weight_conversions",):
        if name in model.__dict__:
            delattr(model, name)
    if getattr(model.config, "auto_map", None) is not None:
        del model.config.auto_map
