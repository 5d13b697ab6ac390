# Licensed under the Apache License, Version 2.0
"""`AtomicExperts` in a graph, as `torch.compile` and `torch.export` trace it. This file travels with pruned checkpoints."""

import torch
from torch import nn

from .operations import expand, product_dtype, reduce


def traced_forward(
    block: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As `AtomicExperts.forward`, of shapes that do not depend on the routing.

    The products are operations that take the widths along; the rest, with the gate function of the family, is traced. (No `len`
    of a tensor here: it would be a constant of an exported program.)
    """
    gate_up, down, *biases = block.weights()
    dtype = product_dtype(gate_up)
    widths = [block.widths[expert] for expert in block.order]
    slot_of_expert = torch.tensor(block.order, device=top_k_index.device).argsort()
    slots, permutation = torch.sort(slot_of_expert[top_k_index].reshape(-1), stable=True)
    tokens = permutation // top_k_index.shape[-1]
    ends = torch.searchsorted(slots, torch.arange(len(widths), device=slots.device), right=True)

    grouped = block.config._experts_implementation == "grouped_mm"
    few_shapes = dtype in (torch.bfloat16, torch.float16) and gate_up.device.type == "cpu"
    step = block.width_step if few_shapes else 0
    # Gates and ups are padded each by itself, unless they are stored in turn.
    pairs = (widths, 2, grouped, step) if block.is_concatenated else ([2 * w for w in widths], 1, grouped, 2 * step)

    output = torch.zeros_like(hidden_states)
    if any(widths):
        activation = expand(hidden_states, tokens, ends, gate_up.to(dtype), *pairs)
        if biases:
            ones = torch.ones_like(hidden_states[:, :1])
            activation = activation + expand(ones, tokens, ends, biases[0].to(dtype)[:, None], *pairs[:3], 0)
        activation = block.weighted_activation(activation, top_k_weights.reshape(-1, 1)[permutation])
        output = reduce(activation, tokens, ends, down.to(dtype), hidden_states, widths, 1, grouped, step)
    if biases:
        shares = top_k_weights.new_zeros(hidden_states.shape[0], len(widths)).scatter_add(
            1, top_k_index, top_k_weights
        )
        # In float32 at least: it is small, and not every CPU has products of half precision.
        wide = torch.promote_types(shares.dtype, torch.float32)
        with torch.autocast(shares.device.type, enabled=False):
            output = output + (shares.to(wide) @ biases[1].to(wide)).to(output.dtype)
    return output
