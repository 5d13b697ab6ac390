# Licensed under the Apache License, Version 2.0
"""What stays of a block while it is trained: copies of its weights, and what they give for the tokens of the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call

from ..modeling.atomic_experts import eager_atomic_experts_forward
from .portion import numbers
from .selection import cut_block, load_rows, rows_of


if TYPE_CHECKING:
    from ..experts import ExpertBlock
    from .block_inputs import Calls
    from .fitted import FittedBlock
    from .portion import Portion


TOKENS_AT_ONCE = 2048
"""Tokens of a step, and of what else is computed for all of them."""


class Student:
    """What stays of a block, in float32 or better, and the calls that it gets.

    Args:
        block (`ExpertBlock`): experts of the unpruned model.
        kept (`list[torch.Tensor]`): kept indices of each expert.
        called (`tuple[Calls, Calls]`), shared (`dict[str, torch.nn.Module]`): as for [`reconstruct_block`].
        portion (`Portion`): the tokens of these calls.

    Attributes:
        parameters (`dict[str, torch.Tensor]`): all that is trained: of the experts, and by their full names of shared experts.
    """

    def __init__(
        self,
        block: ExpertBlock,
        kept: list[torch.Tensor],
        called: tuple[Calls, Calls],
        shared: dict[str, torch.nn.Module],
        portion: Portion,
    ):
        self.called, self.mlps, self.portion = called, shared, portion
        self.dtype = block.module.down_proj.dtype
        exact = exact_type(self.dtype)
        self.experts = cut_block(block, kept).to(exact).requires_grad_(True)
        self.parameters = dict(self.experts.named_parameters())
        for path, mlp in self.mlps.items():
            weights = {f"{path}.{name}": weight for name, weight in mlp.named_parameters()}
            weights.pop(f"{path}.down_proj.bias", None)  # no part of the target
            self.parameters |= {
                name: weight.detach().to(exact, copy=True).requires_grad_(True) for name, weight in weights.items()
            }

    def output(self, *tokens: torch.Tensor) -> torch.Tensor:
        """What it gives for some tokens as in the unpruned model and then for others as in the pruned one, [n, d]."""

        def joined(of_all: Callable[[Calls], torch.Tensor]) -> torch.Tensor:
            return torch.cat([of_all(calls)[some] for calls, some in zip(self.called, tokens)])

        hidden, index, weight = (joined(attrgetter(name)) for name in ("hidden", "index", "weight"))
        # On a CPU the backward of the grouped kernel takes twice as long as one expert after another.
        forward = partial(eager_atomic_experts_forward, self.experts) if hidden.device.type == "cpu" else self.experts
        output = forward(hidden.to(self.experts.down_proj.dtype), index, weight)
        for path, mlp in self.mlps.items():
            hidden, scale = (joined(lambda calls: calls.shared[path][part]).to(output.dtype) for part in (0, 1))
            weights = {name: self.parameters.get(f"{path}.{name}") for name, _ in mlp.named_parameters()}
            if "down_proj.bias" in weights:
                weights["down_proj.bias"] = torch.zeros_like(output[0])
            output = output + scale * functional_call(mlp, weights, (hidden,))
        return output

    @torch.no_grad()
    def error(self, target: torch.Tensor, tokens: torch.Tensor) -> float:
        """Squared error in the pruned model over these tokens, and those of other processes, relative to the squared target."""
        parts = tokens.split(TOKENS_AT_ONCE) if len(tokens) else ()
        error = sum(float((self.output(tokens[:0], part) - target[part]).square().sum()) for part in parts)
        error, energy = numbers(self.portion.added, [error, sum(float(target[part].square().sum()) for part in parts)])
        return error / energy

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of all that is trained."""
        return {name: weight.detach().clone() for name, weight in self.parameters.items()}

    @torch.no_grad()
    def set_between(self, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], share: float) -> None:
        """Takes over what lies on this share of the way from one to the other."""
        for name, weight in self.parameters.items():
            weight.copy_(torch.lerp(one[name], other[name], share))

    @torch.no_grad()
    def load(self, fitted: FittedBlock) -> None:
        """Takes over what the block was fitted to be."""
        for parameter, rows in fitted.experts.items():
            load_rows(self.experts, parameter, rows)
        for name, weight in fitted.shared.items():
            if name in self.parameters:
                self.parameters[name].copy_(weight)

    def as_stored(self, fitted: FittedBlock) -> FittedBlock:
        """What was trained, in the type of the model, in the place of what was fitted."""
        rows = {
            name: [part.to(self.dtype) for part in rows_of(self.experts, name)]
            for name, _ in self.experts.named_parameters()
        }
        shared = {name: weight.detach().to(self.dtype) for name, weight in self.parameters.items() if name not in rows}
        return replace(fitted, rows=rows.pop("down_proj"), trained=rows, shared={**fitted.shared, **shared})


def exact_type(dtype: torch.dtype) -> torch.dtype:
    """What is computed in for weights of this type."""
    return torch.promote_types(dtype, torch.float32)
