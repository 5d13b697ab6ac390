# Licensed under the Apache License, Version 2.0
"""Least squares over all experts of a block at once, without the matrix of all pairs of atomic experts.

The output of a block is one linear function of what its atomic experts do: for token t, `sum_e D_e^T a_te` with `a_te`
[w_e] the activations of expert e times its router weight, and nothing where t is not routed to e. The changes `D_e`
[w_e, d] that come closest to a target,

    minimize  sum_t |y_t - sum_e D_e^T a_te|^2 + sum_e ridge_e |D_e|^2,

have normal equations over all pairs of experts that share tokens. They are solved by conjugate gradients (Hestenes &
Stiefel 1952), which ask only for products with the activations, each expert with its own tokens, preconditioned with
each expert's own equations, `(A_e^T A_e + ridge_e I)^-1`: where experts share no tokens the first step is the solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .portion import Added, alone


TOLERANCE = 1e-2
MOST_STEPS = 50


@dataclass
class Part:
    """The unknowns of one expert.

    Attributes:
        tokens (`torch.Tensor`): the tokens that it gets, distinct, int64 [n].
        activations (`torch.Tensor`): what its kept atomic experts are for these, router weight in, [n, w].
        ridge (`float`): what the squared change costs, above 0, in units of summed squared activations.
    """

    tokens: torch.Tensor
    activations: torch.Tensor
    ridge: float

    def of(self, chosen: torch.Tensor) -> Part:
        """The same for some of the tokens, bool [n]."""
        return Part(self.tokens[chosen], self.activations[chosen], self.ridge)

    def add_output(self, change: torch.Tensor, output: torch.Tensor) -> None:
        """Adds what the change [w, d] makes of these activations to `output` [tokens, d]."""
        output.index_add_(0, self.tokens, self.activations.to(output.dtype) @ change)

    def correlation(self, output: torch.Tensor) -> torch.Tensor:
        """Sum over the tokens of activation times `output` [tokens, d], [w, d]."""
        return self.activations.to(output.dtype).T @ output[self.tokens]


def solve_together(
    parts: Sequence[Part], target: torch.Tensor, added: Added = alone
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The changes of all parts that come closest to the target together.

    Of several processes each has tokens of its own, and all of them the same parts.

    Args:
        parts (`Sequence[Part]`): experts, and whatever else adds to the same output.
        target (`torch.Tensor`): what is to be made up for, [tokens, d], float32 or float64.
        added (`Added`): sums over processes.

    Returns:
        `tuple[list[torch.Tensor], torch.Tensor]`: a change [w, d] for each part, in the type of the target, and what is left
        of the target, [tokens, d]. It is solved up to `TOLERANCE` of the gradient at the start, in the norm of the
        preconditioner; from there on the target changes by less than rounding to 16 bits does.
    """
    factors = [_factor(part, target.dtype, added) for part in parts]
    widths = [part.activations.shape[1] for part in parts]

    def preconditioned(gradient: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.cholesky_solve(own, factor) for own, factor in zip(gradient.split(widths), factors)])

    left = target.clone()
    change = target.new_zeros(sum(widths), target.shape[1])
    gradient = added(torch.cat([part.correlation(left) for part in parts]))
    direction = preconditioned(gradient)
    size = start = (gradient * direction).sum(0)
    enough = TOLERANCE**2 * float(added(start.sum()))
    for _ in range(MOST_STEPS):
        output = torch.zeros_like(left)
        for part, own in zip(parts, direction.split(widths)):
            part.add_output(own, output)
        product = added(torch.cat([part.correlation(output) for part in parts]))
        for part, own, of_own in zip(parts, direction.split(widths), product.split(widths)):
            of_own += part.ridge * own
        step = _ratio(size, (direction * product).sum(0))
        change += step * direction
        left -= step * output
        gradient -= step * product
        solved = preconditioned(gradient)
        size, before = (gradient * solved).sum(0), size
        if (
            float(added(size.sum())) <= enough
        ):  # of all, who would else end at different steps if they round differently
            break
        direction = solved + _ratio(size, before) * direction
    return list(change.split(widths)), left


def _factor(part: Part, dtype: torch.dtype, added: Added) -> torch.Tensor:
    """The Cholesky factor of a part's own normal equations, [w, w]."""
    activations = part.activations.to(dtype)
    own = added(activations.T @ activations)
    own.diagonal().add_(part.ridge)
    return torch.linalg.cholesky(own)


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """0 in columns where there is nothing left to divide."""
    return torch.where(below > 0, above / below, 0)
