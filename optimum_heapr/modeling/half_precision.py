# Licensed under the Apache License, Version 2.0
"""`AtomicExperts` in bfloat16 and float16 on a CPU, without gradients. This file travels with pruned checkpoints.

There oneDNN does the products. It compiles a kernel for each new shape, which takes longer than the product and is kept for
the last 1024 only; and it repacks the weights in each call. So products come in few shapes, or all in one. Where oneDNN has
none of the type, `operations.py` computes them in float32, with gradients and without.
"""

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import nn


# Kernels for 32 numbers of tokens, 16 widths and two products are what oneDNN keeps.
WIDTH_STEPS = 16

# Where the CPU has tiles, a product of all experts is used up to this number of tokens, which takes less than twice as long as
# one token does; not before there is a token an expert on average, as then most weights are read anyway, nor when there
# are as many as a product of the expert alone is good at. Measured on five shapes of blocks.
MANY_TOKENS = 64
MANY_ROWS = 8


def width_step(stock_width: int) -> int:
    """What widths are rounded up to multiples of."""
    return _round_up(stock_width, 256) // WIDTH_STEPS


def rounded_rows(count: int) -> int:
    """What the tokens of a product are rounded up to: 32 numbers up to 1024."""
    if count <= 16:
        return 1 << (count - 1).bit_length()
    return _round_up(count, 16 if count <= 256 else 64)


def rounded_span(span: slice, step: int, total: int) -> tuple[int, int, int]:
    """Rows around those of an expert, a multiple of `step` or all: first, how many are before the expert's, end."""
    size = min(_round_up(span.stop - span.start, step or 1), total)
    first = min(span.start, total - size)
    return first, span.start - first, first + size


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def lacks_products(weight: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the device of a weight has no fast products of its type, or of `dtype` where autocast lowers it: half precision on
    a CPU that oneDNN has no kernels for. torch's own take up to 60 times as long as float32 with the conversion does."""
    return weight.device.type == "cpu" and not _has_products(dtype or weight.dtype)


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if name is None:
        return True
    supported = getattr(torch.ops.mkldnn, name, None)  # not in builds of torch without oneDNN
    return supported is not None and supported()


def wants_gradient(experts: nn.Module, *inputs: torch.Tensor) -> bool:
    # Not the parameters: a weight may be computed from frozen ones and an adapter's.
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *experts.weights()))


def is_half_precision_inference(experts: nn.Module, *inputs: torch.Tensor) -> bool:
    """Whether `half_precision_forward` is to be used. Not where a gradient is wanted: that of each of the views into a packed
    weight that it takes would be as large as the weight."""
    if inputs[0].device.type != "cpu" or (weight := experts.weights()[0]).dtype not in (torch.bfloat16, torch.float16):
        return False
    return not lacks_products(weight) and not wants_gradient(experts, *inputs)


def half_precision_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As `AtomicExperts.forward`."""
    if takes_all_experts(experts.down_proj, len(hidden_states), top_k_index.numel() / experts.num_experts):
        return all_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    return few_shapes_forward(experts, hidden_states, top_k_index, top_k_weights)


def takes_all_experts(weight: torch.Tensor, tokens: int, tokens_an_expert: float) -> bool:
    """Whether one product of all experts is faster than one an expert: where the CPU multiplies matrices of this type by tiles
    (Intel AMX). Others take longer for eight times the operations."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    has_tiles = weight.dtype == torch.bfloat16 and supported is not None and supported()
    return has_tiles and tokens <= MANY_TOKENS and 1 <= tokens_an_expert <= MANY_ROWS


def all_experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """All tokens through all experts, in one product up and one down. What was not routed is zero in between."""
    widths = torch.tensor([experts.widths[expert] for expert in experts.order])
    slot_of_atom = torch.arange(experts.num_experts).repeat_interleave(widths)
    weights = top_k_weights.new_zeros(experts.num_experts, len(hidden_states))
    weights.scatter_add_(0, experts.slots_of(top_k_index).T, top_k_weights.T)

    gate_up = experts.gate_up_proj @ hidden_states.T  # in this order the weights are not repacked
    if experts.has_bias:
        gate_up = gate_up + experts.gate_up_proj_bias[:, None]
    if experts.is_concatenated:  # each expert by itself; the gate function wants all gates and then all ups
        gates = torch.arange(len(slot_of_atom)) + (widths.cumsum(0) - widths)[slot_of_atom]
        gate_up = gate_up.index_select(0, torch.cat([gates, gates + widths[slot_of_atom]]))
    activation = experts.weighted_activation(gate_up.T, weights.index_select(0, slot_of_atom).T)
    activation = activation.masked_fill_((weights == 0).index_select(0, slot_of_atom).T, 0)
    output = activation.contiguous() @ experts.down_proj
    if experts.has_bias:
        output = output + (weights.T @ experts.down_proj_bias[experts.order].to(weights.dtype))
    return output.to(hidden_states.dtype)


def zeros_around(rows: torch.Tensor, left: int, right: int, below: int) -> torch.Tensor:
    """`F.pad`, which torch 2.9 refuses where no columns are left: for experts of width 0."""
    if rows.shape[1] + left + right == 0:
        return rows.new_zeros(len(rows) + below, 0)
    return F.pad(rows, (left, right, 0, below))


def few_shapes_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """One expert after another, by products of few different shapes.

    Tokens and widths are rounded up by taking some of the next expert's tokens, and some of its atomic experts or of the
    previous one's. What they compute is overwritten; into the down projection zeros take their place.
    """
    tokens, weights, counts = experts.sorted_by_slot(top_k_index, top_k_weights)
    widths = [experts.widths[expert] for expert in experts.order]
    starts = [0, *itertools.accumulate(widths)]
    gate_up_weights, down_weights, total = experts.gate_up_proj, experts.down_proj, starts[-1]

    output = torch.zeros_like(hidden_states)
    for own, run in experts.runs(counts, split=True):
        surplus = max(rounded_rows(count) - count for _, count in run)
        rows = hidden_states.index_select(0, F.pad(tokens[own], (0, surplus)))
        weight, partial = weights[own], down_weights.new_empty(len(rows), down_weights.shape[1])
        row = 0
        for slot, count in run:
            width, rounded_count = widths[slot], rounded_rows(count)
            first, before, end = rounded_span(slice(starts[slot], starts[slot + 1]), experts.width_step, total)

            gate_up = F.linear(rows[row : row + rounded_count], gate_up_weights[2 * first : 2 * end])
            gate_up = gate_up[:count, 2 * before : 2 * (before + width)]
            if experts.has_bias:
                gate_up = gate_up + experts.gate_up_proj_bias[2 * starts[slot] : 2 * starts[slot + 1]]
            activation = experts.weighted_activation(gate_up, weight[row : row + count])
            activation = zeros_around(activation, before, end - first - width - before, rounded_count - count)
            torch.mm(activation.to(partial.dtype), down_weights[first:end], out=partial[row : row + rounded_count])
            row += count
        experts.add_partial(output, partial[:row], run, tokens[own], weight)
    return output
