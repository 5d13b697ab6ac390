# Licensed under the Apache License, Version 2.0
"""The calibration forward of an expert block, and the tap that turns its backward into statistics.

HEAPr scores atomic expert k of an expert by `1/2 mean(e_k^T G e_k)` with `e_k = h_k w_k` its output, `w_k` its column of
the down projection, and `G = mean(g g^T)` the covariance of the gradient `g = dL/dE` at the expert's output
(arXiv 2509.22299). Since `h_k` is a scalar and `g . w_k = dL/dh_k`,

    e_k^T G e_k = h_k^2 mean((g . w_k)^2)      and      score_k = 1/2 mean(h_k^2) mean((dL/dh_k)^2),

so two vectors a block, collected where `h` is formed, replace the d x d matrices. The router weight is part of
`dL/dh_k` here: it scales the gradient that reaches the expert's output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from ..experts import model_name, suits_grouped_kernel
from ..utils.errors import HeaprError
from .accumulator import BlockAccumulator, RoutedRows


if TYPE_CHECKING:
    from ..experts import ExpertBlock
    from .accumulator import Split


CALIBRATION_IMPLEMENTATION = "heapr_calibration"


class _Tap(torch.autograd.Function):
    """Identity on h [rows, I] whose backward adds to the accumulator.

    All sums are made in the backward: with activation checkpointing the forward runs twice, the backward once.
    """

    @staticmethod
    def forward(ctx, activation, accumulator, routed):
        ctx.save_for_backward(activation)
        ctx.accumulator, ctx.routed = accumulator, routed
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx, gradient):
        (activation,) = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            ctx.accumulator.add(activation, gradient, ctx.routed)
        return gradient, None, None


def _looped_linear(
    rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool
) -> torch.Tensor:
    """`_grouped_linear` for weights that the grouped kernel does not take: one expert after another."""
    counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    matrices = weight if is_transposed else weight.transpose(-2, -1)
    parts = rows.to(weight.dtype).split(counts)
    output = torch.cat([part @ matrix for part, matrix in zip(parts, matrices)])
    return output if bias is None else output + bias


def _norms(output: torch.Tensor, split: Split | None) -> torch.Tensor:
    """Norm of each row of the experts' outputs, [rows, d], of which each process has a summand where these are split."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    if split is not None:
        output = split.summed(output.to(dtype, copy=True))
    return torch.linalg.vector_norm(output, dim=-1, dtype=dtype)


def calibration_experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts' forward of transformers' `grouped_mm` with the tap between activation and down projection.

    Args:
        hidden_states (`torch.Tensor`): [tokens, d].
        top_k_index (`torch.Tensor`): experts of each token, [tokens, K].
        top_k_weights (`torch.Tensor`): their router weights, [tokens, K].

    Returns:
        `torch.Tensor`: [tokens, d].
    """
    top_k = top_k_index.shape[-1]
    expert_of_row, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(expert_of_row, minlength=self.num_experts)
    offsets = counts.cumsum(0).to(torch.int32)
    bias_of = (lambda bias: bias[expert_of_row]) if self.has_bias else (lambda bias: None)

    router_weights = top_k_weights.reshape(-1)[order]
    routed = None

    rows = hidden_states[order // top_k]
    linear = _grouped_linear if suits_grouped_kernel(self.down_proj) else _looped_linear
    gate_up = linear(
        rows, self.gate_up_proj, offsets, bias_of(getattr(self, "gate_up_proj_bias", None)), self.is_transposed
    )
    activation = self._apply_gate(gate_up)
    if torch.is_grad_enabled():
        accumulator: BlockAccumulator = self._heapr_accumulator
        if not activation.requires_grad:
            # The first block of the model: nothing below it is needed, so the graph starts here.
            activation = activation.detach().requires_grad_(True)
        # Routers that let a token skip send it to some expert with a weight of 0: it is no token of that expert.
        is_routed = router_weights.detach() != 0
        # One transfer for both, as an accelerator has to be waited for.
        *count_list, num_routed = torch.cat([counts, is_routed.sum().unsqueeze(0)]).tolist()
        valid = is_routed if num_routed < len(is_routed) else None
        if accumulator.token_mask is not None:
            valid = accumulator.token_mask[order // top_k] & is_routed
        routed = RoutedRows(expert_of_row, count_list, router_weights.detach(), valid)
        activation = _Tap.apply(activation, accumulator, routed)
    output = linear(
        activation, self.down_proj, offsets, bias_of(getattr(self, "down_proj_bias", None)), self.is_transposed
    )
    if routed is not None:
        routed.output_norm = _norms(output.detach(), accumulator.split)
    output = output * router_weights.unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return output[inverse].view(-1, top_k, output.shape[-1]).sum(1).to(hidden_states.dtype)


def new_accumulators(
    blocks: list[ExpertBlock], gram: bool = False, sources: int = 1, splits: dict[str, Split] | None = None
) -> dict[str, BlockAccumulator]:
    """Sums that are zero, by block path, each on the device of its block, of text of so many sources; `splits` says where the
    blocks are parts of such."""
    return {
        block.path: BlockAccumulator(
            block.num_experts,
            block.width,
            block.device,
            block.module.down_proj.dtype,
            gram,
            sources,
            (splits or {}).get(block.path),
        )
        for block in blocks
    }


@contextmanager
def calibration_tap(
    model: torch.nn.Module,
    blocks: list[ExpertBlock],
    gram: bool = False,
    sources: int = 1,
    splits: dict[str, Split] | None = None,
) -> Iterator[dict[str, BlockAccumulator]]:
    """Switches the experts of `model` to the calibration forward; yields the accumulators by block path.

    What was there before comes back when the block ends, also after an error.

    Raises:
        HeaprError: if the class of the model does not let its experts be switched.
    """
    accumulators = new_accumulators(blocks, gram, sources, splits)
    with switched_experts(model, blocks), tapped(blocks, accumulators):
        yield accumulators


@contextmanager
def tapped(blocks: list[ExpertBlock], accumulators: dict[str, BlockAccumulator]) -> Iterator[None]:
    """The calibration forward of these blocks adds to `accumulators` until the block ends."""
    try:
        for block in blocks:
            block.module._heapr_accumulator = accumulators[block.path]
        yield
    finally:
        for block in blocks:
            block.module.__dict__.pop("_heapr_accumulator", None)


@contextmanager
def switched_experts(model: torch.nn.Module, blocks: list[ExpertBlock]) -> Iterator[None]:
    """The experts of `model` run the calibration forward until the block ends. Without gradients it measures nothing.

    Raises:
        HeaprError: if the class of the model does not let its experts be switched.
    """
    previous = model.get_experts_implementation()
    ALL_EXPERTS_FUNCTIONS.register(CALIBRATION_IMPLEMENTATION, calibration_experts_forward)
    try:
        model.set_experts_implementation(CALIBRATION_IMPLEMENTATION)
        for block in blocks:
            # transformers leaves classes that it does not recognise as they are, without a word.
            if block.module.config._experts_implementation != CALIBRATION_IMPLEMENTATION:
                raise HeaprError(
                    f"model={model_name(model)!r}: {block.path} does not follow set_experts_implementation, so nothing "
                    "would be measured; use a model class whose module is decorated with @use_experts_implementation"
                )
        yield
    finally:
        model.set_experts_implementation(previous)
