# Licensed under the Apache License, Version 2.0
"""Cuts a model in memory: selects the kept rows of each expert and changes the model's class, in place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..calibration.processes import connected_processes
from ..calibration.runner import frozen_in_evaluation_mode
from ..experts import find_expert_blocks, model_name
from ..fingerprint import check_same_model, model_fingerprint
from ..layerwise.decoder import Decoder
from ..utils.errors import HeaprError
from ..utils.logging import with_paths
from ..utils.placement import place
from .change import whole_or_refused
from .compensation import compensate_experts
from .feasibility import check_family
from .layer_by_layer import compensate_together
from .selection import cut_block, set_rows
from .stock import StockLayout, cut_to_stock, stock_layout


if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..calibration.statistics import AtomicStatistics, BlockStatistics
    from ..experts import ExpertBlock
    from ..planning.plan import PruningPlan
    from ..text.samples import CalibrationData
    from .fitted import FittedBlock


def apply_plan(
    model: torch.nn.Module,
    plan: PruningPlan,
    statistics: AtomicStatistics | None = None,
    data: CalibrationData | None = None,
    fits_path: Path | None = None,
) -> torch.nn.Module:
    """Turns `model` into a pruned model, in place: a block at a time, whose old weights go before the next, so that at most
    the weights and one layer are in memory. Compensation over blocks and reconstruction are shared by all processes that are
    connected, each with a model of its own: then it is to be called on each.

    If something ends it after the first change, running out of memory for one, the model is neither the old nor the new one,
    and says so whenever it is used.

    Args:
        model (`PreTrainedModel`): the model that the plan was made for.
        plan (`PruningPlan`): what stays; `compensation` is filled in where it asks for it.
        statistics (`AtomicStatistics`, *optional*): second-order ones, needed to compensate within experts.
        data (`CalibrationData`, *optional*): needed to compensate over blocks.
        fits_path (`Path`, *optional*): as of [`~optimum_heapr.surgery.layer_by_layer.compensate_together`].

    Returns:
        `PreTrainedModel`: the same object, now of the pruned class; it saves and loads like any other.

    Raises:
        HeaprError: if the plan was made for another model or does not fit its expert blocks.
    """
    blocks = check_plan(model, plan)
    check_compensation(plan, statistics, data)
    accelerator = connected_processes() if plan.config.compensates_blocks else None
    with whole_or_refused(model) as change:
        compensate_model(
            model, plan, blocks, statistics, data, lambda weights: change.begins(), fits_path, accelerator
        )
        change.begins()
        cut_model(model, plan, blocks)
    return model


def compensate_model(
    model: torch.nn.Module,
    plan: PruningPlan,
    blocks: list[ExpertBlock],
    statistics: AtomicStatistics | None,
    data: CalibrationData | None,
    changes: Callable[[list[torch.Tensor]], None],
    fits_path: Path | None = None,
    accelerator: Accelerator | None = None,
) -> None:
    """What [`apply_plan`] does to the weights that stay before it cuts, if the plan asks for compensation or training.

    Args:
        model, plan, statistics, data, fits_path: as there.
        blocks (`list[ExpertBlock]`): of the model.
        changes (`Callable`): is given the weights that are about to be changed, before each change.
        accelerator (`Accelerator`, *optional*): as of [`~optimum_heapr.surgery.layer_by_layer.compensate_together`].
    """
    plan.forget_fits()
    if plan.config.compensates_blocks:
        _compensate_together(model, plan, blocks, data, changes, fits_path, accelerator)
    if plan.config.compensates_experts:
        for block in with_paths(blocks, desc="Compensating", unit="layer"):
            changes([block.module.down_proj])
            plan.compensation[block.path] = compensate_block(
                block, plan.kept[block.path], statistics.blocks[block.path], plan.config.ridge
            )


def _compensate_together(
    model: torch.nn.Module,
    plan: PruningPlan,
    blocks: list[ExpertBlock],
    data: CalibrationData,
    changes: Callable[[list[torch.Tensor]], None],
    fits_path: Path | None,
    accelerator: Accelerator | None,
) -> None:
    place(model)  # as calibration does

    def take_over(block: ExpertBlock, fitted: FittedBlock) -> None:
        own = [getattr(block.module, name) for name in fitted.experts]
        changes([*own, *map(model.get_parameter, fitted.shared)])
        _take_over(model, block, plan.kept[block.path], fitted)

    with tempfile.TemporaryDirectory(prefix="heapr-") as folder, frozen_in_evaluation_mode(model):
        compensate_together(
            Decoder(model, blocks), data, plan, Path(folder), take_over, fits_path=fits_path, accelerator=accelerator
        )


def cut_model(model: torch.nn.Module, plan: PruningPlan, blocks: list[ExpertBlock]) -> StockLayout | None:
    """What [`apply_plan`] does once the plan is known to fit; on a model without storage it changes shapes alone."""
    layout = None
    if plan.config.layout == "variable":
        _cut_to_variable(model, plan, blocks)
    else:
        layout = cut_to_stock(model, plan, blocks)
    model.config.heapr_config = plan.config.public().to_dict()
    _forget_origin(model)
    return layout


def _cut_to_variable(model: torch.nn.Module, plan: PruningPlan, blocks: list[ExpertBlock]) -> None:
    from ..modeling.auto import pruned_configuration, register_model_class
    from ..modeling.conversion import register_conversions

    for block in with_paths(blocks, desc="Pruning", unit="layer"):
        model.set_submodule(block.path, cut_block(block, plan.kept[block.path]))
        _drop_weights(block.module)

    config = model.config
    config.__class__ = pruned_configuration(type(config))
    vars(config).pop("model_type", None)  # a loaded configuration has its own, which would hide that of the class
    config.expert_widths, config.experts_as = plan.widths, vars(config).get("experts_as", "packed")
    model.__class__ = register_model_class(type(config))
    register_conversions(type(config).model_type, not blocks[0].module.is_concatenated, blocks[0].module.has_bias)


def _drop_weights(stock: torch.nn.Module) -> None:
    """Lets the weights of a module that was cut go now, whoever still refers to the module. Its shapes stay."""
    for name, parameter in list(stock.named_parameters(recurse=False)):
        setattr(stock, name, torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))


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
    if plan.config.layout == "variable":
        check_family(model)
    else:
        stock_layout(model, blocks, plan)  # a refusal must come before the first change
    return blocks


def check_compensation(plan: PruningPlan, statistics: AtomicStatistics | None, data: CalibrationData | None) -> None:
    """Refuses a plan that asks for compensation without what that needs.

    Raises:
        HeaprError: if there are no statistics, they are of another model, or they are vectors; with the scope `block`, if
            there is no text.
    """
    if plan.config.compensates_blocks and data is None:
        raise HeaprError(
            "plan: asks for compensation_scope='block' and data=None; pass the calibration text, or plan with "
            "compensation_scope='expert'"
        )
    if not plan.config.compensates_experts:
        return
    if statistics is None:
        raise HeaprError(
            "plan: asks for compensate=True and statistics=None; pass the statistics that it was made from, or plan with "
            "compensate=False"
        )
    check_same_model(plan.model, statistics.fingerprint["model"], "plan")
    for path in plan.kept:
        statistics.blocks[path].check_grams(path, "compensate=True", gradients=False)


@torch.no_grad()
def _take_over(model: torch.nn.Module, block: ExpertBlock, kept: list[torch.Tensor], fitted: FittedBlock) -> None:
    """Changes what stays of a block in place, which serves every layout."""
    for parameter, rows in fitted.experts.items():
        set_rows(block, kept, rows, parameter)
    for name, weight in fitted.shared.items():
        model.get_parameter(name).copy_(weight)


@torch.no_grad()
def compensate_block(
    block: ExpertBlock, kept: list[torch.Tensor], statistics: BlockStatistics, ridge: float
) -> list[tuple[float, float]]:
    """Changes the kept rows of the down projection, in place, so that they make up for those that are about to go.

    What is cut afterwards, and how it is stored, is not its business: it serves every layout.

    Args:
        block (`ExpertBlock`): experts of the unpruned model.
        kept (`list[torch.Tensor]`): kept indices of each expert.
        statistics (`BlockStatistics`): second-order statistics of the block.
        ridge (`float`): least ridge, in units of the mean squared activation.

    Returns:
        `list[tuple[float, float]]`: for each expert the relative squared error of its output on the calibration tokens,
        without and with compensation.
    """
    rows = [block.down_rows(expert) for expert in range(block.num_experts)]
    grams = statistics.mean("activation_gram_sum").to(block.module.down_proj.device)
    results = compensate_experts([part.T for part in rows], grams, kept, statistics.token_count.tolist(), ridge)
    set_rows(block, kept, [result.down_proj.T for result in results])
    return [(result.error_before, result.error_after) for result in results]


def _forget_origin(model: torch.nn.Module) -> None:
    """Removes what described the unpruned checkpoint and would be wrong in the pruned one."""
    for name in ("_weight_conversions",):
        if name in model.__dict__:
            delattr(model, name)
    if getattr(model.config, "auto_map", None) is not None:
        del model.config.auto_map
