# Licensed under the Apache License, Version 2.0
"""The loss of recovery: next-token cross-entropy and the divergence from a teacher, a chunk of tokens at a time.

With z the logits of the student, T the temperature, and p, q the distributions softmax(z / T) of teacher and student,

    w_ce (-log softmax(z)[target])  +  w_kd T^2 KL(p || q)

(Hinton et al., arXiv 1503.02531, for T^2, which keeps gradients of one size whatever T is). Of the teacher only its k
largest probabilities are kept, and all others as one more outcome, so that a large vocabulary can be stored; by the log
sum inequality this KL is a lower bound of the whole one, and is 0 where that is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


IGNORED = -100
"""Target of a position that does not count, as everywhere in transformers."""

CHUNK_TOKENS = 1024


@dataclass
class TeacherOutput:
    """The next-token distributions of the teacher, at a temperature.

    Attributes:
        indices (`torch.Tensor`): the k likeliest tokens, int64 [..., k].
        log_probabilities (`torch.Tensor`): of these, float32 [..., k].
        log_rest (`torch.Tensor`): logarithm of the probability of all other tokens together, float32 [...].
    """

    indices: torch.Tensor
    log_probabilities: torch.Tensor
    log_rest: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, temperature: float, top_k: int) -> TeacherOutput:
        """Reduces logits [..., vocabulary] of a teacher.

        Args:
            logits (`torch.Tensor`): of any floating dtype; converted to float32 a chunk at a time.
            temperature (`float`): what the logits are divided by.
            top_k (`int`): how many tokens are kept; one less than the vocabulary at most, so that a rest is left.
        """
        rows = logits.flatten(0, -2)
        top_k = min(top_k, rows.shape[-1] - 1)
        parts = []
        for chunk in rows.split(CHUNK_TOKENS):
            scaled = chunk.float() / temperature
            top, indices = scaled.topk(top_k, dim=-1)
            total = scaled.logsumexp(-1)
            rest = scaled.scatter_(-1, indices, -torch.inf).logsumexp(-1)
            parts.append((indices, top - total.unsqueeze(-1), rest - total))
        indices, log_probabilities, log_rest = (torch.cat(tensors) for tensors in zip(*parts))
        shape = logits.shape[:-1]
        return cls(indices.view(*shape, -1), log_probabilities.view(*shape, -1), log_rest.view(shape))

    def rows(self, chosen: slice) -> TeacherOutput:
        """Some tokens of it."""
        return TeacherOutput(self.indices[chosen], self.log_probabilities[chosen], self.log_rest[chosen])

    def flatten(self) -> TeacherOutput:
        """All tokens in one dimension."""
        return TeacherOutput(
            self.indices.flatten(0, -2), self.log_probabilities.flatten(0, -2), self.log_rest.flatten()
        )


def divergence(logits: torch.Tensor, teacher: TeacherOutput, temperature: float) -> torch.Tensor:
    """KL(teacher || student) of each token at a temperature, in nats, without the factor T^2.

    Args:
        logits (`torch.Tensor`): of the student, float32 [tokens, vocabulary].
        teacher (`TeacherOutput`): of the same tokens, at the same temperature.
        temperature (`float`): what the logits are divided by.

    Returns:
        `torch.Tensor`: [tokens].
    """
    return _Divergence.apply(logits, teacher, temperature)


class _Divergence(torch.autograd.Function):
    """KL(p || q) over the tokens kept and the rest, with its gradient in closed form.

    With z = logits / T, the gradient is q - p at a token that is kept, and at any other its share of the rest times
    q_rest - p_rest: one pass over the vocabulary, where autograd would make several.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, teacher: TeacherOutput, temperature: float):
        scaled = logits / temperature
        top = scaled.gather(-1, teacher.indices)
        others = scaled.scatter_(-1, teacher.indices, -torch.inf)
        rest = others.logsumexp(-1)
        total = torch.logaddexp(top.logsumexp(-1), rest)
        top, log_rest = top - total.unsqueeze(-1), rest - total
        p_top, p_rest = teacher.log_probabilities.exp(), teacher.log_rest.exp()
        ctx.temperature, ctx.indices = temperature, teacher.indices
        ctx.save_for_backward(others, rest, top.exp() - p_top, log_rest.exp() - p_rest)
        of_top = (p_top * (teacher.log_probabilities - top)).sum(-1)
        return of_top + p_rest * (teacher.log_rest - log_rest)

    @staticmethod
    def backward(ctx, gradient):
        others, rest, at_top, at_rest = ctx.saved_tensors
        each = (gradient / ctx.temperature).unsqueeze(-1)
        of_logits = (others - rest.unsqueeze(-1)).exp_().mul_(at_rest.unsqueeze(-1) * each)
        return of_logits.scatter_(-1, ctx.indices, at_top * each), None, None


def summed_recovery_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    teacher: TeacherOutput | None = None,
    cross_entropy_weight: float = 1.0,
    distillation_weight: float = 0.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The loss, summed over the tokens that count.

    Args:
        logits (`torch.Tensor`): of the student, [..., vocabulary]; overwritten with their gradient where one is needed.
        targets (`torch.Tensor`): the token that comes next, `IGNORED` where none does, [...].
        teacher (`TeacherOutput`, *optional*): of the same tokens; needed with a `distillation_weight`.
        cross_entropy_weight, distillation_weight (`float`): of the two parts.
        temperature (`float`): of the second.
    """
    targets = targets.flatten()
    teacher = teacher.flatten() if teacher is not None else None

    def loss_of_rows(chunk: torch.Tensor, rows: slice) -> torch.Tensor:
        counted = targets[rows] != IGNORED
        loss = torch.zeros((), device=chunk.device)
        if cross_entropy_weight:
            loss = cross_entropy_weight * F.cross_entropy(chunk, targets[rows], ignore_index=IGNORED, reduction="sum")
        if distillation_weight:
            apart = divergence(chunk, teacher.rows(rows), temperature) * counted
            loss = loss + distillation_weight * temperature**2 * apart.sum()
        return loss

    return _SumOverRows.apply(logits.flatten(0, -2), loss_of_rows)


class _SumOverRows(torch.autograd.Function):
    """Sum of a loss over rows of logits, in float32 a chunk at a time.

    The gradient takes the place of the logits in memory as it is formed, so that a large vocabulary never needs a second
    [tokens, vocabulary] tensor, nor one in float32.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, loss_of_rows: Callable[[torch.Tensor, slice], torch.Tensor]):
        needed = ctx.needs_input_grad[0]
        gradient = logits.detach()
        total = torch.zeros((), device=logits.device)
        for start in range(0, len(gradient), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            with torch.set_grad_enabled(needed):
                chunk = gradient[rows].float().requires_grad_(needed)
                loss = loss_of_rows(chunk, rows)
            total += loss.detach()
            if needed:
                gradient[rows] = torch.autograd.grad(loss, chunk)[0]
        if needed:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, gradient_of_sum):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(gradient_of_sum), None


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token in float32, 0 where none counts: [..., vocabulary], [...] -> [...]."""
    rows, flat = logits.flatten(0, -2), targets.flatten()
    chunks = zip(rows.split(CHUNK_TOKENS), flat.split(CHUNK_TOKENS))
    losses = [F.cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="none") for row, target in chunks]
    return torch.cat(losses).view(targets.shape)
