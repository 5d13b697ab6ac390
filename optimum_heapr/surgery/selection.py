# Licensed under the Apache License, Version 2.0
"""The kept atomic experts of one expert, cut out of its parameters: what every layout is made of.

Only [`cut_block`] looks at more than one expert: a checkpoint can be cut without loading a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..experts import split_gate_and_up, stack_gate_and_up


if TYPE_CHECKING:
    from ..experts import ExpertBlock
    from ..modeling.atomic_experts import AtomicExperts


def packed_rows(block: ExpertBlock, parameter: str, expert: int, indices: torch.Tensor) -> torch.Tensor:
    """One expert's share of a parameter of `AtomicExperts`, for w kept atomic experts.

    Args:
        block (`ExpertBlock`): experts of the unpruned model.
        parameter (`str`): name of the parameter in the block.
        expert (`int`): which expert of the block.
        indices (`torch.Tensor`): kept atomic experts, ascending, [w].

    Returns:
        `torch.Tensor`: `gate_up_proj` [2 w, d], `down_proj` [w, d], `gate_up_proj_bias` [2 w] or `down_proj_bias` [1, d].
    """
    if parameter == "down_proj_bias":
        return block.module.down_proj_bias[expert].unsqueeze(0)
    rows = _kept_rows(block, parameter, expert, indices)
    return rows if parameter == "down_proj" else stack_gate_and_up(rows, block.module.is_concatenated)


def padded_expert(block: ExpertBlock, parameter: str, expert: int, indices: torch.Tensor, width: int) -> torch.Tensor:
    """One expert's share of a stock parameter of width `width`: kept atomic experts first, then zeros.

    An atomic expert whose down projection is zero contributes nothing, whatever its gate and up projection are; its gate
    and up rows and biases are zero as well.

    Args:
        block, parameter, expert, indices: as for [`packed_rows`].
        width (`int`): atomic experts of each expert of the result, at least w.

    Returns:
        `torch.Tensor`: what stands at `[expert]` in the stock module's parameter.
    """
    if parameter == "down_proj_bias":
        return block.module.down_proj_bias[expert]
    kept = _kept_rows(block, parameter, expert, indices)
    if parameter == "down_proj":
        rows = kept.new_zeros(width, *kept.shape[1:])
        rows[: len(indices)] = kept
        return rows if block.module.is_transposed else rows.T
    rows = kept.new_zeros(2, width, *kept.shape[2:])
    rows[:, : len(indices)] = kept
    stored = stack_gate_and_up(rows, block.module.is_concatenated)
    return stored.T if block.module.is_transposed and parameter == "gate_up_proj" else stored


def _kept_rows(block: ExpertBlock, parameter: str, expert: int, indices: torch.Tensor) -> torch.Tensor:
    """`down_proj` as [w, d], the others as [2, w, …], gate first."""
    indices = indices.to(getattr(block.module, parameter).device)
    if parameter == "down_proj":
        return block.down_rows(expert)[indices]
    if parameter == "gate_up_proj":
        return block.gate_up_rows(expert)[:, indices]
    return block.gate_up_bias(expert)[:, indices]


def shape_of_rows(block: ExpertBlock, parameter: str, width: int) -> tuple[int, ...]:
    """What [`set_rows`] takes of one expert that keeps so many atomic experts.

    Raises:
        KeyError: if the block has no such parameter.
    """
    shapes = {"down_proj": (width, block.hidden_size), "gate_up_proj": (2, width, block.hidden_size)}
    if block.module.has_bias:
        shapes |= {"gate_up_proj_bias": (2, width), "down_proj_bias": (block.hidden_size,)}
    return shapes[parameter]


def set_rows(
    block: ExpertBlock, kept: list[torch.Tensor], rows: list[torch.Tensor], parameter: str = "down_proj"
) -> None:
    """Puts other rows in the place of the kept ones of each expert, in the block itself.

    Args:
        block (`ExpertBlock`): experts of the unpruned model.
        kept (`list[torch.Tensor]`): kept atomic experts of each expert, [w].
        rows (`list[torch.Tensor]`): of each expert, for `down_proj` [w, d], for `gate_up_proj` [2, w, d] and for its bias
            [2, w], gate first, and for `down_proj_bias` [d].
        parameter (`str`): name of the parameter in the block.
    """
    for expert, (indices, new) in enumerate(zip(kept, rows)):
        if parameter == "down_proj_bias":
            block.module.down_proj_bias[expert] = new
            continue
        views = {
            "down_proj": block.down_rows,
            "gate_up_proj": block.gate_up_rows,
            "gate_up_proj_bias": block.gate_up_bias,
        }
        view = views[parameter](expert)  # of the parameter
        indices = indices.to(view.device)
        if parameter == "down_proj":
            view[indices] = new
        else:
            view[:, indices] = new


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


@torch.no_grad()
def load_rows(experts: AtomicExperts, parameter: str, rows: list[torch.Tensor]) -> None:
    """Puts rows of each expert, as for [`set_rows`], into the parameter of a module that was cut."""
    if parameter == "down_proj_bias":
        packed = torch.stack(rows)
    else:
        parts = [rows[expert] for expert in experts.order]
        packed = torch.cat(
            parts if parameter == "down_proj" else [stack_gate_and_up(part, experts.is_concatenated) for part in parts]
        )
    getattr(experts, parameter).copy_(packed)


def rows_of(experts: AtomicExperts, parameter: str) -> list[torch.Tensor]:
    """What [`load_rows`] puts there, as copies."""
    packed = getattr(experts, parameter).detach().clone()
    if parameter == "down_proj_bias":
        return list(packed)
    widths = [experts.widths[expert] for expert in experts.order]
    if parameter == "down_proj":
        parts = packed.split(widths)
    else:
        parts = [
            split_gate_and_up(part, experts.is_concatenated) for part in packed.split([2 * width for width in widths])
        ]
    return [part for _, part in sorted(zip(experts.order, parts), key=lambda pair: pair[0])]
