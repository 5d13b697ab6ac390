# Licensed under the Apache License, Version 2.0
"""Reconstruction: what stays of a block is trained on what the unpruned block gives. No labels, no backward through the model.

Compensation fits the down projections, of which the output is a linear function. What its atomic experts do, which is what
the gate and up rows say, stays as it was then. Here all rows that stay are trained, those of shared experts and biases
included, from the fit on, to

    minimize  sum_t |y_t - y'_t|^2,

`y_t` the output of the unpruned block for token t in the unpruned model, `y'_t` that of the pruned block for the same token. Of
each step half of the tokens are given as they are in the pruned model, which is what the pruned layers below make of them: so a
layer makes up for what was lost below it, too. The other half are given as they are in the unpruned model: what was lost below
depends on the text, and making up for it alone costs more on other text than it gains. The router stays as it is, and where it
sends a token is known before a block is trained.

A part of the tokens is held out of the fit and of training, and decides for each block how far it goes from what was fitted to what
was trained; if not at all, the block is as it is without: fitted to all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..utils.logging import get_logger, progress
from .portion import numbers
from .student import TOKENS_AT_ONCE, Student, exact_type


if TYPE_CHECKING:
    from ..configuration import HeaprConfig
    from ..experts import ExpertBlock
    from .block_inputs import BlockInputs, Calls
    from .fitted import FittedBlock
    from .portion import Portion


logger = get_logger(__name__)

WARM_UP = 20
"""Steps until the learning rate is reached; from there on it falls to zero in a straight line."""
BETAS = (0.9, 0.95)
SHARES = (1.0, 0.75, 0.5, 0.25)
"""How much of the way from what was fitted to what was trained may be kept."""
STRETCHES, HELD_OUT = 64, 8
"""The text is cut into so many stretches, and every so manieth is held out."""


@torch.no_grad()
def block_output(block: ExpertBlock, inputs: BlockInputs, shared: Container[str]) -> torch.Tensor:
    """What a block of the unpruned model gives, [tokens, d], in float32 or better.

    Args:
        block (`ExpertBlock`): experts of the unpruned model.
        inputs (`BlockInputs`): what it was called with.
        shared (`Container[str]`): paths of the shared experts whose output is part of it.
    """
    calls = inputs.routing()
    output = torch.cat([block.module(*part) for part in zip(*(call.split(TOKENS_AT_ONCE) for call in calls))])
    output = output.to(exact_type(output.dtype))
    for name, activations in inputs.shared_activations():
        if name in shared:
            output += F.linear(activations, inputs.shared[name].down_proj.weight)
    return output


def reconstruct_block(
    block: ExpertBlock,
    kept: list[torch.Tensor],
    fit: Callable[[torch.Tensor | None], FittedBlock],
    called: tuple[Calls, Calls],
    shared: dict[str, torch.nn.Module],
    target: torch.Tensor,
    config: HeaprConfig,
    portion: Portion,
) -> tuple[FittedBlock, dict[str, float | str | None]]:
    """Trains what stays of a block, and keeps as much of that as is best on held-out tokens.

    Of several processes each takes of every step the tokens that it has, and all take the same step.

    Args:
        block (`ExpertBlock`): experts of the unpruned model.
        kept (`list[torch.Tensor]`): kept indices of each expert.
        fit (`Callable`): what compensation makes of it, fitted to the tokens of these numbers, or to all; here and in other
            processes.
        called (`tuple[Calls, Calls]`): what it is called with in the unpruned model, routed as in the pruned one, and what in the
            pruned one; of the same tokens.
        shared (`dict[str, torch.nn.Module]`): by path, the shared experts whose output is part of the target.
        target (`torch.Tensor`): what it is to give for these tokens, [tokens, d].
        config (`HeaprConfig`): `reconstruction_steps`, `reconstruction_learning_rate` and `seed` are used.
        portion (`Portion`): says which tokens these are.

    Returns:
        `tuple[FittedBlock, dict]`: what the block becomes, and what that rests on: squared errors of its output on held-out
        tokens, relative to the squared output, after plain removal (`removed`), fitted (`fitted`) and trained (`trained`),
        on which share of the way from the one to the other the last is (`share`), and which of the two was kept (`kept`). An
        error that is not finite is `None`, and its share, too. The dictionary is empty if there was nothing to train.
    """
    place = torch.arange(portion.tokens) // max(portion.tokens // STRETCHES, 1) % HELD_OUT == HELD_OUT - 1
    held_out, tokens = (torch.where(part)[0].to(target.device) for part in (place, ~place))
    held_out = portion.own(held_out)
    energy = numbers(portion.added, [float(target[held_out].square().sum())])[0]
    if not 0 < energy < math.inf:
        nothing = f"nothing held out of {portion.tokens} tokens to train it by"
        found = "what it gives for the tokens held out is zero or not finite" if place.any() else nothing
        logger.warning("%s: %s; it stays as it was fitted", block.path, found)
        return fit(None), {}
    fitted = fit(portion.own(tokens))  # or it would know those that decide
    if fitted.error_before == 0:  # nothing is removed
        return fitted, {}
    student = Student(block, kept, called, shared, portion)
    if not _groups(student.parameters, config):
        logger.warning("%s: nothing stays of it that could be trained", block.path)
        return fit(None), {}
    found = {"removed": student.error(target, held_out)}
    student.load(fitted)
    found["fitted"] = student.error(target, held_out)
    before = student.weights()
    train(student, target, tokens, config)
    after = student.weights()

    def error_at(share: float) -> float:
        student.set_between(before, after, share)
        error = student.error(target, held_out)
        return error if math.isfinite(error) else math.inf

    share = min(SHARES, key=error_at)
    student.set_between(before, after, share)
    trained = student.as_stored(fitted)
    student.load(trained)
    error = student.error(target, held_out)
    found["trained"], found["share"] = (error, share) if math.isfinite(error) else (None, None)
    better = error < found["fitted"]  # not if it is not a number
    if not better:
        logger.warning("%s: training did not make it better; it stays as it was fitted", block.path)
    return trained if better else fit(None), {**found, "kept": "trained" if better else "fitted"}


def inputs_bytes(block: ExpertBlock, tokens: int) -> int:
    """What is there besides, while a block is fitted that is then trained: its inputs in both models, and its target."""
    stored = block.module.down_proj.dtype.itemsize
    return tokens * block.hidden_size * (4 * stored + max(stored, 4))  # shared experts may have inputs of their own


def training_bytes(block: ExpertBlock, tokens: int, top_k: int | None) -> int:
    """What training one block takes at most, shared experts left aside.

    Per token its inputs in both models, twice while micro-batches of one are joined, and the target; per weight itself,
    its gradient, two moments of that, what it was before and after, and what it was and is stored as; and what the backward
    of a step needs.
    """
    stored, width, hidden = block.module.down_proj.dtype.itemsize, block.width, block.hidden_size
    exact = max(stored, 4)
    of_tokens = tokens * hidden * (6 * stored + exact)
    of_weights = block.num_experts * 3 * width * hidden * (6 * exact + 2 * stored)
    of_step = TOKENS_AT_ONCE * (top_k or block.num_experts) * 2 * (2 * hidden + 5 * width) * exact
    return of_tokens + of_weights + of_step


@torch.enable_grad()
def train(student: Student, target: torch.Tensor, tokens: torch.Tensor, config: HeaprConfig) -> None:
    """Adam (Kingma & Ba 2015) on the squared error, on other tokens in each step, until all have had their turn, and again.

    Args:
        student (`Student`): changed in place.
        target (`torch.Tensor`): what it is to give, [tokens, d].
        tokens (`torch.Tensor`): which it is trained on, by number in the whole text.
        config (`HeaprConfig`): as for [`reconstruct_block`].
    """
    portion, steps = student.portion, config.reconstruction_steps
    energy = portion.added(target[portion.own(tokens)].square().sum()) / len(tokens)
    optimizer = torch.optim.Adam(_groups(student.parameters, config), betas=BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / steps)
    )
    batches = _batches(tokens, steps, torch.Generator().manual_seed(config.seed))
    for batch in progress(batches, total=steps, desc="Reconstructing", unit="step", leave=False):
        optimizer.zero_grad()
        own = [portion.own(half) for half in batch.tensor_split(2)]
        if any(map(len, own)):
            error = (student.output(*own) - target[torch.cat(own)]).square().sum() / energy
            error.backward()
        for weight in () if portion.is_alone else student.parameters.values():
            weight.grad = portion.added(torch.zeros_like(weight) if weight.grad is None else weight.grad)
        optimizer.step()
        schedule.step()


def _groups(parameters: dict[str, torch.Tensor], config: HeaprConfig) -> list[dict[str, Any]]:
    """What Adam is given: each weight with a learning rate in units of its root mean square, or for a bias of that of the weight that
    it is added behind. Where of that nothing is left, or zeros alone, there is nothing to train."""
    groups = []
    for name, weight in parameters.items():
        name = name.removesuffix("_bias").removesuffix(".bias")
        unit = parameters[name if name in parameters else f"{name}.weight"].detach().square().mean().sqrt()
        if unit > 0:  # of nothing it is no number
            groups.append({"params": [weight], "lr": config.reconstruction_learning_rate * float(unit)})
    return groups


def _batches(tokens: torch.Tensor, steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    left = tokens[:0]
    size = min(TOKENS_AT_ONCE, len(tokens))
    for _ in range(steps):
        if len(left) < size:
            left = tokens[torch.randperm(len(tokens), generator=generator).to(tokens.device)]
        yield left[:size]
        left = left[size:]
