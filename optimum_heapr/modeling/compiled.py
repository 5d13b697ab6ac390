# Licensed under the Apache License, Version 2.0
"""`AtomicExperts` as one operation of a compiled graph. This file travels with pruned checkpoints.

Shapes inside a block depend on the routing, so `torch.compile` must not look into it. As an operation it has an output of
known shape. Its backward computes the forward again: nothing of unknown shape can be handed on.
"""

import itertools
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import library, nn


PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")

# Operations take tensors and numbers, so a block is named by its number. They are named after this module: a copy of the
# file that came with a checkpoint has its own blocks.
_NAME = f"heapr::{re.sub(r'[^0-9a-zA-Z]', '_', __name__)}"
_NUMBERS = itertools.count()
_BLOCKS: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def numbered(block: nn.Module) -> int:
    """Gives an `AtomicExperts` a number."""
    number = next(_NUMBERS)
    _BLOCKS[number] = block
    return number


def compiled_forward(
    block: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As `AtomicExperts.forward`."""
    parameters = block.weights()
    device = hidden_states.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return _operation(hidden_states, top_k_index, top_k_weights, parameters, block.number, autocast)


def _compute(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    parameters: list[torch.Tensor],
    number: int,
    autocast: torch.dtype | None,
) -> torch.Tensor:
    block = _BLOCKS[number]
    with (
        _lent(block, parameters),
        torch.autocast(hidden_states.device.type, dtype=autocast, enabled=autocast is not None),
    ):
        return block.compute(hidden_states, top_k_index, top_k_weights)


@contextmanager
def _lent(block: nn.Module, parameters: list[torch.Tensor]) -> Iterator[None]:
    """The block with these tensors as its parameters."""
    own = dict(block._parameters)
    block._parameters.update(zip([name for name in PARAMETERS if name in own], parameters, strict=True))
    try:
        yield
    finally:
        block._parameters.update(own)


@library.custom_op(_NAME, mutates_args=())
def _operation(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    parameters: list[torch.Tensor],
    number: int,
    autocast: torch.dtype | None,
) -> torch.Tensor:
    return _compute(hidden_states, top_k_index, top_k_weights, parameters, number, autocast)


@_operation.register_fake
def _(hidden_states, top_k_index, top_k_weights, parameters, number, autocast):
    return torch.empty_like(hidden_states)


@library.custom_op(f"{_NAME}_backward", mutates_args=())
def _backward_operation(
    gradient: torch.Tensor,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    parameters: list[torch.Tensor],
    wanted: list[bool],
    number: int,
    autocast: torch.dtype | None,
) -> list[torch.Tensor]:
    inputs = [hidden_states, top_k_weights, *parameters]

    def compute(*differentiated):
        left = iter(differentiated)
        hidden, weights, *rest = (next(left) if chosen else tensor for tensor, chosen in zip(inputs, wanted))
        return _compute(hidden, top_k_index, weights, rest, number, autocast)

    _, differentiate = torch.func.vjp(compute, *itertools.compress(inputs, wanted))
    return list(differentiate(gradient))


@_backward_operation.register_fake
def _(gradient, hidden_states, top_k_index, top_k_weights, parameters, wanted, number, autocast):
    return [
        torch.empty_like(tensor) for tensor in itertools.compress([hidden_states, top_k_weights, *parameters], wanted)
    ]


def _setup_context(ctx, inputs, output) -> None:
    hidden_states, top_k_index, top_k_weights, parameters, ctx.number, ctx.autocast = inputs
    ctx.save_for_backward(hidden_states, top_k_index, top_k_weights, *parameters)


def _backward(ctx, gradient):
    hidden_states, top_k_index, top_k_weights, *parameters = ctx.saved_tensors
    wants_hidden, _, wants_weights, wants_parameters, *_ = ctx.needs_input_grad
    wanted = [wants_hidden, wants_weights, *wants_parameters]
    found = iter(
        _backward_operation(
            gradient, hidden_states, top_k_index, top_k_weights, parameters, wanted, ctx.number, ctx.autocast
        )
    )
    hidden, weights, *rest = (next(found) if chosen else None for chosen in wanted)
    return hidden, None, weights, rest, None, None


_operation.register_autograd(_backward, setup_context=_setup_context)
