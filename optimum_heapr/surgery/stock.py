# Licensed under the Apache License, Version 2.0
"""Stock layouts: pruned models of the original architecture, which load wherever the unpruned model loads.

* `uniform`: every expert keeps the same number of atomic experts, and the one field of the configuration that sets the
  width of experts is lowered. Experts may go from the router, as many of each layer; then that of their number is, too.
* `padded`: experts keep different numbers and are zero-padded to the widest, which is exact but saves little or nothing.

There is no table of families here: [`~optimum_heapr.sizing`] finds out which field sets what. Shared experts are often sized
`width * number of shared experts`: they are zero-padded to a multiple of the new width and the number is raised, which
leaves their function as it is. Anything else that would change its shape is a reason to refuse.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..experts import MLP_PROJECTIONS, is_gated_mlp, model_name
from ..planning.alignment import padded_width
from ..planning.size import planned_sizes
from ..sizing import (
    ExpertRows,
    build,
    changed_tensors,
    experts_config,
    fields_with_value,
    find_routing,
    has_expert_shapes,
    with_other_names,
)
from ..utils.errors import HeaprError
from ..utils.logging import get_logger, with_paths
from ..utils.sizes import parse_size
from .selection import padded_expert


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..experts import ExpertBlock
    from ..planning.plan import PruningPlan


logger = get_logger(__name__)


@dataclass
class StockLayout:
    """How a model of the original architecture holds the pruned experts.

    Attributes:
        width (`int`): atomic experts of every expert.
        fields (`dict[str, int]`): new values of the configuration's fields.
        skeleton (`PreTrainedModel`): the pruned model without storage.
        padded (`list[str]`): parameters of shared experts that are zero-padded.
        rows (`dict[str, ExpertRows]`): parameters and buffers of routers that lose the entries of dropped experts.
    """

    width: int
    fields: dict[str, int]
    skeleton: PreTrainedModel
    padded: list[str] = field(default_factory=list)
    rows: dict[str, ExpertRows] = field(default_factory=dict)

    def resized(self, name: str, tensor: torch.Tensor, plan: PruningPlan) -> torch.Tensor:
        """A parameter or buffer that is no routed expert's, as the pruned model has it."""
        if name in self.rows:
            return self.rows[name].select(tensor, plan.routed[self.rows[name].block])
        return zero_pad(tensor, self.skeleton.get_parameter(name).shape) if name in self.padded else tensor


@torch.no_grad()
def cut_to_stock(model: PreTrainedModel, plan: PruningPlan, blocks: list[ExpertBlock]) -> StockLayout:
    """Cuts `model` in place; its class stays, and its configuration gets a smaller width, and fewer experts if some are dropped.

    Raises:
        HeaprError: if the plan's widths differ with layout `uniform`, or the architecture cannot hold the width.
    """
    layout = stock_layout(model, blocks, plan)
    warn_of_zeros(layout.skeleton, plan)
    for block in with_paths(blocks, desc="Pruning", unit="layer"):
        experts = plan.routed[block.path]
        for name, parameter in list(block.module.named_parameters(recurse=False)):
            made = None
            for place, expert in enumerate(experts):
                padded = padded_expert(block, name, expert, plan.kept[block.path][expert], layout.width)
                if made is None:
                    made = padded.new_empty(len(experts), *padded.shape)
                made[place] = padded
            _replace(block.module, name, made)
    for path in [*layout.padded, *layout.rows]:
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        _replace(module, name, layout.resized(path, getattr(module, name), plan))
    for path, module in layout.skeleton.named_modules():
        _copy_sizes(module, model.get_submodule(path))
    config = experts_config(model, blocks)
    for name, value in layout.fields.items():
        setattr(config, name, value)
    if not type(model).__module__.startswith("transformers."):
        _take_code_along(model)
    return layout


def stock_layout(model: PreTrainedModel, blocks: list[ExpertBlock], plan: PruningPlan) -> StockLayout:
    """How the model's own architecture holds what a plan leaves; see [`find_stock_layout`]."""
    return find_stock_layout(model, blocks, stock_width(plan), len(next(iter(plan.routed.values()))))


def stock_width(plan: PruningPlan) -> int:
    """The one width that all experts of the result have.

    Raises:
        HeaprError: if there is none.
    """
    widths = {width for experts in plan.routed_widths.values() for width in experts}
    if plan.config.layout == "uniform" and len(widths) > 1:
        raise HeaprError(
            f"layout='uniform': the plan keeps widths from {min(widths)} to {max(widths)}; plan with "
            "allocation='uniform', or use layout='padded' or 'variable'"
        )
    if plan.config.layout == "uniform":
        return widths.pop()
    return padded_width(max(widths), plan.config, list(plan.original_width.values()))


def find_stock_layout(
    model: PreTrainedModel, blocks: list[ExpertBlock], width: int, experts: int | None = None
) -> StockLayout:
    """The configuration under which the model's own architecture has experts of `width` and is otherwise the same.

    Args:
        model (`PreTrainedModel`): the unpruned model; its weights are not read.
        blocks (`list[ExpertBlock]`): its expert blocks.
        width (`int`): atomic experts of every expert of the result.
        experts (`int`, *optional*): experts of every layer of the result, if not those that there are.

    Raises:
        HeaprError: if no single field of the configuration sets the width, or the number, or that field sets something else as well.
    """
    layout = _narrower(model, blocks, width)
    return layout if experts in (None, blocks[0].num_experts) else _with_fewer(model, blocks, layout, experts)


def _narrower(model: PreTrainedModel, blocks: list[ExpertBlock], width: int) -> StockLayout:
    originals, config = {block.width for block in blocks}, experts_config(model, blocks)
    if originals == {width}:
        return StockLayout(width, {}, build(model, blocks, {}))
    for name in fields_with_value(config, blocks[0].width) if len(originals) == 1 else ():
        values = dict.fromkeys(with_other_names(config, name), width)
        skeleton = build(model, blocks, values)
        if skeleton is not None and has_expert_shapes(skeleton, blocks, width):
            return _with_shared_experts(model, blocks, StockLayout(width, values, skeleton), name)
    raise HeaprError(
        f"model={model_name(model)!r}: no single field of {type(config).__name__} sets the width of all experts "
        f"({', '.join(map(str, sorted(originals)))}); use layout='variable'"
    )


def warn_of_zeros(skeleton: PreTrainedModel, plan: PruningPlan) -> None:
    """Says so where what a stock layout fills up with zeros takes the model above the target of its plan.

    Args:
        skeleton (`PreTrainedModel`): the pruned model; only shapes are read.
        plan (`PruningPlan`): what it was made by.
    """
    name, asked = plan.config.goal
    if name not in ("target_parameters", "target_size"):
        return
    _, planned = planned_sizes(plan)
    each = plan.model["parameters_per_atomic_expert"]
    held, unit, target = sum(parameter.numel() for parameter in skeleton.parameters()), "parameters", asked
    if name == "target_size":
        zeros = (held - planned.parameters) * plan.storage["bytes_per_atomic_expert"] // each
        held, unit, target = planned.num_bytes + zeros, "bytes", parse_size(name, asked)
    if held > target:
        logger.warning(
            "%s=%r: layout=%r fills experts up with zeros, and with them the weights have %s %s; layout='variable' "
            "stores none",
            name,
            asked,
            plan.config.layout,
            f"{held:,}",
            unit,
        )


def _with_fewer(model: PreTrainedModel, blocks: list[ExpertBlock], layout: StockLayout, experts: int) -> StockLayout:
    routing = find_routing(model, blocks)
    fields = {**layout.fields, routing.field: experts}
    skeleton = build(model, blocks, fields)
    if skeleton is None or not has_expert_shapes(skeleton, blocks, layout.width, experts):
        strange = ["its experts"]
    else:
        strange = sorted(set(changed_tensors(model, blocks, skeleton)) - {*layout.padded, *routing.rows})
    if strange:
        raise HeaprError(
            f"model={model_name(model)!r}: {routing.field}={experts} does not suit {strange[0]}; ask for another num_experts"
        )
    return replace(layout, fields=fields, skeleton=skeleton, rows=routing.rows)


def zero_pad(tensor: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """`tensor` at the start of a tensor of zeros of `shape`, which is nowhere smaller."""
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def _with_shared_experts(
    model: PreTrainedModel, blocks: list[ExpertBlock], layout: StockLayout, field: str
) -> StockLayout:
    """Raises the number of shared experts where their size follows the width of the routed ones."""
    changed = changed_tensors(model, blocks, layout.skeleton)
    if not changed:
        return layout
    stranger = next((path for path in changed if not _is_of_gated_mlp(model, path)), None)
    count = None if stranger else _count(model, changed[0], blocks[0].width)
    if count:
        config = experts_config(model, blocks)
        raised = -(-count * blocks[0].width // layout.width)
        for name in fields_with_value(config, count):
            fields = {**layout.fields, name: raised}
            skeleton = build(model, blocks, fields)
            if skeleton is not None and _holds(model, blocks, skeleton, changed, layout.width, raised):
                logger.info("shared experts are zero-padded from %s to %s: %s=%d", count, raised, name, raised)
                return StockLayout(layout.width, fields, skeleton, changed)
    path = stranger or changed[0]
    raise HeaprError(
        f"model={model_name(model)!r}: its configuration sizes {path.rpartition('.')[0]} by {field!r} as well, and stock "
        "code cannot hold it beside narrower routed experts; use layout='variable'"
    )


def _holds(
    model: PreTrainedModel,
    blocks: list[ExpertBlock],
    skeleton: PreTrainedModel,
    changed: list[str],
    width: int,
    count: int,
) -> bool:
    """Whether shared experts grew to `count` times `width` and nothing else changed."""
    if not has_expert_shapes(skeleton, blocks, width):
        return False
    if not set(changed_tensors(model, blocks, skeleton)) <= set(changed):
        return False
    for path in changed:
        before, after = model.get_parameter(path).shape, skeleton.get_parameter(path).shape
        axis = _width_axis(path, len(before))
        if after[axis] != count * width or before[:axis] + before[axis + 1 :] != after[:axis] + after[axis + 1 :]:
            return False
    return True


def _is_of_gated_mlp(model: PreTrainedModel, path: str) -> bool:
    """Whether a parameter belongs to the MLP of shared experts: the kind of module that zero rows leave as it is."""
    layer, _, parameter = path.rpartition(".")
    mlp, _, projection = layer.rpartition(".")
    if parameter not in ("weight", "bias") or "shared" not in mlp.rpartition(".")[2]:
        return False
    return projection in MLP_PROJECTIONS and is_gated_mlp(model.get_submodule(mlp))


def _count(model: PreTrainedModel, path: str, width: int) -> int | None:
    """How many times `width` fits into a parameter of shared experts, if it does so exactly."""
    shape = model.get_parameter(path).shape
    size = shape[_width_axis(path, len(shape))]
    return size // width if size % width == 0 else None


def _width_axis(path: str, dimensions: int) -> int:
    return 1 if dimensions == 2 and ".down_proj." in path else 0


def _copy_sizes(source: nn.Module, target: nn.Module) -> None:
    """Takes over the sizes that modules keep as attributes, such as `in_features`."""
    for name, value in vars(source).items():
        if type(value) is int and type(vars(target).get(name)) is int:
            setattr(target, name, value)


def _take_code_along(model: PreTrainedModel) -> None:
    """Lets the checkpoint carry the code of an architecture that transformers does not have."""
    from ..modeling.modeling_heapr import auto_class_name

    type(model.config).register_for_auto_class("AutoConfig")
    type(model).register_for_auto_class(auto_class_name(type(model.config)))


def _replace(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts a tensor in the place of a parameter or a buffer."""
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor.contiguous(), requires_grad=old.requires_grad)
    setattr(module, name, tensor)
