# Licensed under the Apache License, Version 2.0
"""Least squares over all experts of a block at once, without the matrix of all pairs of atomic experts.

The output of a block is one linear function of what its atomic experts do: for token t, `sum_e D_e^T a_te` with `a_te`
[w_e] the activations of expert e times its router weight, and nothing where t is not routed to e. The changes `D_e`
[w_e, d] that come closest to a target,

    minimize  sum_t |y_t - sum_e D_e^T a_te|^2 + sum_e ridge_e |D_e|^2,

have normal equations over all pairs of experts that share tokens. They are solved by conjugate gradients (Hestenes &
Stiefel 1952), which ask only for products with the activations, each expert with its own tokens, preconditioned with
each expert's own equations, `(A_e^T A_e + ridge_e I)^-1`: where experts share no tokens the first step is the solution.

Nothing here is as large as the output of all tokens: the target comes as its correlation with the activations, and how much of it
is left follows from the steps, each of which lowers the sum above by its size times that of the preconditioned gradient.

Each of the d columns is a problem of its own, with the same matrix. So where the unknowns are many, some columns at a time are
solved for, and what the solver needs besides the gradient, whose place the solution takes, is as large as these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .portion import Added, alone


TOLERANCE = 1e-2
MOST_STEPS = 50
NUMBERS_AT_ONCE = 2**23
"""Of the output, [tokens, d]: so many tokens at a time go through all experts."""
UNKNOWNS_AT_ONCE = 2**25
"""Of the changes, [all widths, d]: so many columns at a time are solved for."""


@dataclass
class Part:
    """The unknowns of one expert.

    Attributes:
        tokens (`torch.Tensor`): the tokens that it gets, rising, int64 [n].
        activations (`torch.Tensor`): what its kept atomic experts are for these, router weight in, [n, w].
        ridge (`float`): what the squared change costs, above 0, in units of summed squared activations.
    """

    tokens: torch.Tensor
    activations: torch.Tensor
    ridge: float

    def of(self, first: int, end: int) -> Part:
        """The same for the tokens from `first` to before `end`, which are numbered anew."""
        edges = torch.tensor([first, end], device=self.tokens.device)
        some = slice(*torch.searchsorted(self.tokens, edges).tolist())
        return Part(self.tokens[some] - first, self.activations[some], self.ridge)

    def add_output(self, change: torch.Tensor, output: torch.Tensor) -> None:
        """Adds what the change [w, d] makes of these activations to `output` [tokens, d]."""
        output.index_add_(0, self.tokens, self.activations.to(output.dtype) @ change)

    def add_correlation(self, output: torch.Tensor, correlation: torch.Tensor) -> None:
        """Adds the sum over the tokens of activation times `output` [tokens, d] to `correlation` [w, d]."""
        correlation.addmm_(self.activations.to(output.dtype).T, output[self.tokens])


def chunks(tokens: int, size: int) -> list[tuple[int, int]]:
    """Spans of tokens whose output of so many numbers is in memory at a time; one that is empty where there are none."""
    step = max(NUMBERS_AT_ONCE // size, 1)
    return [(first, min(first + step, tokens)) for first in range(0, max(tokens, 1), step)]


def solve_together(
    parts: Sequence[Part], tokens: int, gradient: torch.Tensor, added: Added = alone
) -> tuple[list[torch.Tensor], float]:
    """The changes of all parts that come closest to the target together.

    Of several processes each has tokens of its own, and all of them the same parts.

    Args:
        parts (`Sequence[Part]`): experts, and whatever else adds to the same output.
        tokens (`int`): how many there are here.
        gradient (`torch.Tensor`): sum over the tokens here of activations times target, of one part after the other, [all widths, d],
            float32 or float64; the changes take its place.
        added (`Added`): sums over processes.

    Returns:
        `tuple[list[torch.Tensor], float]`: a change [w, d] for each part, in the type of the gradient, and by how much they lower the
        squared target, summed over the tokens. It is solved up to `TOLERANCE` of the gradient at the start, in the norm of the
        preconditioner; from there on the target changes by less than rounding to 16 bits does.
    """
    widths, size = [part.activations.shape[1] for part in parts], gradient.shape[1]
    factors = [_factor(part, gradient.dtype, added) for part in parts]
    spans = [(end - first, [part.of(first, end) for part in parts]) for first, end in chunks(tokens, size)]
    lowered = 0.0
    turns = min(max(math.ceil(gradient.numel() / UNKNOWNS_AT_ONCE), 1), size)
    for columns in gradient.tensor_split(turns, dim=1):
        change, by = _solve_columns(parts, factors, spans, added(columns.contiguous()), added)
        columns.copy_(change)
        lowered += by
    return list(gradient.split(widths)), lowered


def numbers_at_once(unknowns: int) -> int:
    """How many numbers the solver holds at most besides the gradient and the factors: of each unknown that it solves for at once its
    gradient, the change, a direction, the product of that with the matrix, here and where the sum over processes is on another device, and a
    term of a column's sum."""
    return 6 * min(unknowns, UNKNOWNS_AT_ONCE)


def _solve_columns(
    parts: Sequence[Part],
    factors: Sequence[torch.Tensor],
    spans: Sequence[tuple[int, list[Part]]],
    gradient: torch.Tensor,
    added: Added,
) -> tuple[torch.Tensor, float]:
    """Some columns of what [`solve_together`] gives, of one part after the other; `gradient`, of all processes, is overwritten."""
    widths = [part.activations.shape[1] for part in parts]
    change, held = torch.zeros_like(gradient), torch.empty_like(gradient)

    def precondition() -> torch.Tensor:
        for own, of_own, factor in zip(gradient.split(widths), held.split(widths), factors):
            of_own.copy_(torch.cholesky_solve(own, factor))
        return held

    def multiply(direction: torch.Tensor) -> torch.Tensor:
        held.zero_()
        for count, here in spans:
            output = direction.new_zeros(count, direction.shape[1])
            for part, own in zip(here, direction.split(widths)):
                part.add_output(own, output)
            for part, of_own in zip(here, held.split(widths)):
                part.add_correlation(output, of_own)
        total = added(held)
        for part, own, of_own in zip(parts, direction.split(widths), total.split(widths)):
            of_own.add_(own, alpha=part.ridge)
        return total

    direction = precondition().clone()
    lengths = (gradient * direction).sum(0)
    enough, lowered = TOLERANCE**2 * float(added(lengths.sum())), 0.0
    for _ in range(MOST_STEPS):
        result = multiply(direction)
        step = _ratio(lengths, (direction * result).sum(0))
        change.addcmul_(direction, step)
        gradient.addcmul_(result, step, value=-1)
        del result
        lowered += float((step.double() * lengths.double()).sum())
        solved = precondition()
        lengths, before = (gradient * solved).sum(0), lengths
        # Of all, who would else end at different steps if they round differently.
        if float(added(lengths.sum())) <= enough:
            break
        direction.mul_(_ratio(lengths, before)).add_(solved)
    lowered += sum(part.ridge * float(own.square().sum()) for part, own in zip(parts, change.split(widths)))
    return change, lowered


def _factor(part: Part, dtype: torch.dtype, added: Added) -> torch.Tensor:
    """The Cholesky factor of a part's own normal equations, [w, w]."""
    rows = part.activations.split(max(NUMBERS_AT_ONCE // part.activations.shape[1], 1))
    own = added(sum(some.T @ some for some in (few.to(dtype) for few in rows)))
    own.diagonal().add_(part.ridge)
    return torch.linalg.cholesky(own)


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """0 in columns where there is nothing left to divide."""
    return torch.where(below > 0, above / below, 0)
