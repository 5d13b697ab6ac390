# Licensed under the Apache License, Version 2.0
"""The sums that a calibration makes of one expert block, over the rows of all experts at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


ROWS_IN_A_RUN = 64
"""Rows of one expert that are added one after another; what runs give is added then, so that rounding stays small."""
NUMBERS_AT_ONCE_CPU = 2**19
"""Squares are made of this many numbers at a time on a CPU, so that they are still in its cache when they are added."""
GRAM_PANEL_CPU = 96
"""Columns of a Gram matrix that are made at a time on a CPU; above the diagonal only."""


@dataclass
class RoutedRows:
    """What the sums need to know of the rows of one micro-batch, which are sorted by expert.

    Attributes:
        expert (`torch.Tensor`): number of the expert, [rows], rising.
        counts (`list[int]`): rows of each expert.
        router_weight (`torch.Tensor`): [rows].
        valid (`torch.Tensor`, *optional*): which rows count, [rows]: not those of padding, nor those that the router gave
            the weight 0; `None` if all do.
        output_norm (`torch.Tensor`, *optional*): norm of the expert's output, [rows]; known once the forward is through.
    """

    expert: torch.Tensor
    counts: list[int]
    router_weight: torch.Tensor
    valid: torch.Tensor | None
    output_norm: torch.Tensor | None = None


@dataclass(frozen=True)
class Split:
    """Which atomic experts of each expert of a block this process has, where others have the rest.

    Attributes:
        group (`ProcessGroup`): all of these processes.
        part (`slice`): the atomic experts of this one.
        width (`int`): those of all, I.
    """

    group: ProcessGroup
    part: slice
    width: int

    def placed(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the atomic experts here, [..., I'], among zeros for those of the others, [..., I]."""
        total = values.new_zeros(*values.shape[:-1], self.width)
        total[..., self.part] = values
        return total

    def placed_matrices(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of symmetric matrices, [E, I', I], as what adds up to these, [E, I, I]: each number and its mirror image are of
        the process that has the smaller row."""
        total = rows.new_zeros(len(rows), self.width, self.width)
        total[:, self.part] = rows
        return completed(total)

    def summed(self, summands: torch.Tensor) -> torch.Tensor:
        """The sum of what each process has; `summands` are overwritten."""
        torch.distributed.all_reduce(summands, group=self.group)
        return summands


def completed(matrices: torch.Tensor) -> torch.Tensor:
    """Fills in the lower halves of matrices, [E, I, I], of which only the upper ones are kept up to date."""
    for matrix in matrices:
        matrix.copy_(matrix.triu() + matrix.triu(1).T)
    return matrices


class BlockAccumulator:
    """Running sums of one expert block, on the device of its weights, in float32, or float64 for float64 weights.

    Args:
        gram (`bool`): also accumulate the two I x I matrices of each expert.
        sources (`int`): S, the sources of the text; where these are several, all but the matrices is summed by source.
        split (`Split`, *optional*): which atomic experts these are, if other processes have the rest of each expert; the two
            matrices have a row for each of these, [E, I', I].

    Attributes:
        source (`int`): which of the sources the current micro-batch is of.
        counts (`bool`): whether that is to be added.
        activation_sq_sum (`torch.Tensor`): sum of h^2, [E, S, I], or without the dimension for one source.
        gradient_sq_sum (`torch.Tensor`): sum of (dL/dh)^2, likewise.
        fisher_sum (`torch.Tensor`): sum of (h dL/dh)^2, likewise.
        token_count (`torch.Tensor`): tokens routed to each expert, [E, S] or [E], int64.
        output_norm_sum (`torch.Tensor`): sum of router weight times the norm of the expert's output, likewise.
        activation_gram_sum (`torch.Tensor`, *optional*): sum of r^2 h h^T with r the router weight, [E, I, I].
        gradient_gram_sum (`torch.Tensor`, *optional*): sum of (dL/dh) (dL/dh)^T, [E, I, I].
        token_mask (`torch.Tensor`, *optional*): which tokens of the current micro-batch count, [tokens]; `None` if all.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        gram: bool = False,
        sources: int = 1,
        split: Split | None = None,
    ):
        self.sources, self.source, self.split, self.counts = sources, 0, split, True
        options = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
        # A row for each expert and source, and views of it.
        self._vectors = torch.zeros(3, num_experts * sources, width, **options)
        self._counts = torch.zeros(num_experts * sources, dtype=torch.int64, device=device)
        self._norms = torch.zeros(num_experts * sources, **options)
        shape = (num_experts,) if sources == 1 else (num_experts, sources)
        self.activation_sq_sum, self.gradient_sq_sum, self.fisher_sum = self._vectors.view(3, *shape, width)
        self.token_count, self.output_norm_sum = self._counts.view(shape), self._norms.view(shape)
        square = num_experts, width, width if split is None else split.width
        self.activation_gram_sum = torch.zeros(square, **options) if gram else None
        self.gradient_gram_sum = torch.zeros(square, **options) if gram else None
        self.token_mask: torch.Tensor | None = None

    def sums(self) -> dict[str, torch.Tensor]:
        """What is accumulated, by name, without what is not measured; the tensors themselves."""
        names = (
            "activation_sq_sum",
            "gradient_sq_sum",
            "fisher_sum",
            "token_count",
            "output_norm_sum",
            "activation_gram_sum",
            "gradient_gram_sum",
        )
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def finite(self) -> torch.Tensor:
        """Which of the sums are finite, bool, in their order; of matrices the diagonal decides, by Cauchy and Schwarz."""
        first = 0 if self.split is None else self.split.part.start
        parts = (part.diagonal(first, 1, 2) if "_gram_" in name else part for name, part in self.sums().items())
        return torch.stack([part.isfinite().all() for part in parts])

    def move_to(self, total: BlockAccumulator) -> None:
        """Adds these sums to those of `total`, and begins anew."""
        own = self.sums()
        for name, tensor in total.sums().items():
            tensor += own[name]
        self.clear()

    def complete(self) -> None:
        """Fills in the lower halves of the matrices; of those that are split, whatever puts them together does."""
        for matrices in (self.activation_gram_sum, self.gradient_gram_sum):
            if matrices is not None and self.split is None:
                completed(matrices)

    def clear(self) -> None:
        """Sets all sums to zero."""
        for tensor in self.sums().values():
            tensor.zero_()

    def add(self, activation: torch.Tensor, gradient: torch.Tensor, routed: RoutedRows) -> None:
        """Adds one micro-batch: `activation` and `gradient` [rows, I], sorted by expert."""
        if not self.counts:
            return
        router_weight = routed.router_weight.to(self.output_norm_sum.dtype)
        ones, row = torch.ones_like(routed.expert), routed.expert * self.sources + self.source
        if routed.valid is not None:
            # Neither padding on the right nor a router weight of 0 has a gradient: only h and that weight need the mask.
            router_weight, ones = router_weight * routed.valid, ones * routed.valid
        self._counts.index_add_(0, row, ones)
        self._norms.index_add_(0, row, router_weight * routed.output_norm)
        self._add_vectors(activation, gradient, routed)
        if self.activation_gram_sum is not None:
            self._add_matrices(self.activation_gram_sum, activation, routed.counts, router_weight.square())
            self._add_matrices(self.gradient_gram_sum, gradient, routed.counts)

    def _add_matrices(
        self, total: torch.Tensor, rows: torch.Tensor, counts: list[int], weight: torch.Tensor | None = None
    ) -> None:
        """The sum of `weight row row^T` of each expert; where others have columns of the rows, [rows, I], they are brought here
        first."""
        rows, split = rows.to(total.dtype), self.split
        first, columns = (0, rows) if split is None else (split.part.start, split.summed(split.placed(rows)))
        weighted = rows.split(counts) if weight is None else _weighted(rows, weight[:, None], counts)
        for of_expert, mine, all_of_them in zip(total, weighted, columns.split(counts)):
            _add_gram(of_expert, mine, all_of_them, first)

    def _add_vectors(self, activation: torch.Tensor, gradient: torch.Tensor, routed: RoutedRows) -> None:
        """The three vectors of all experts at once, by a few operations for each piece of the rows."""
        rows, width = activation.shape
        # Both terms never fall, so what is equal belongs to one expert and to one run.
        run = routed.expert + torch.arange(rows, device=routed.expert.device) // ROWS_IN_A_RUN
        runs = self._vectors.new_zeros(3, len(self.token_count) + rows // ROWS_IN_A_RUN + 1, width)
        step = max(NUMBERS_AT_ONCE_CPU // width, 1) if runs.device.type == "cpu" else max(rows, 1)
        squares = runs.new_empty(
            2, min(step, rows), width
        )  # memory that is new for each piece takes longer than squaring
        for start in range(0, rows, step):
            part = slice(start, start + step)
            h, g = (whole[part].to(runs.dtype) for whole in (activation, gradient))
            h_square, g_square = squares[:, : len(h)]
            torch.mul(h, h, out=h_square)
            torch.mul(g, g, out=g_square)
            if routed.valid is not None:
                h_square.mul_(routed.valid[part, None])
            runs[0].index_add_(0, run[part], h_square)
            runs[1].index_add_(0, run[part], g_square)
            runs[2].index_add_(0, run[part], h_square.mul_(g_square))
        expert_of_run = torch.zeros(runs.shape[1], dtype=torch.int64, device=runs.device)
        row_of_run = expert_of_run.scatter_(0, run, routed.expert) * self.sources + self.source
        self._vectors.index_add_(1, row_of_run, runs)


def _weighted(rows: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> Iterable[torch.Tensor]:
    """Rows times their weights, of one expert after another; on a CPU each when it is its turn, so that it is in the cache."""
    if rows.device.type == "cpu":
        return (part * own for part, own in zip(rows.split(counts), weight.split(counts)))
    return (rows * weight).split(counts)


def _add_gram(total: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, first: int) -> None:
    """Adds `rows^T columns`, [n, I'] and [n, I], to `total` [I', I], of whose diagonal the first number is in the column `first`: to
    what is above it and to some of what is below."""
    width = rows.shape[1]
    panel = GRAM_PANEL_CPU if rows.device.type == "cpu" else width
    for start in range(0, width if len(rows) else 0, panel):
        part, above = slice(start, start + panel), slice(first + start, None)
        total[part, above].addmm_(rows[:, part].T, columns[:, above])
