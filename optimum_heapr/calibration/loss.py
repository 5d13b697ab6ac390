# Licensed under the Apache License, Version 2.0
"""The calibration loss: next-token cross-entropy, summed over tokens.

A sum, not a mean: batches of different lengths then weigh by their tokens, the statistics do not depend on how samples
are batched, and gradients of half-precision models stay away from underflow. No auxiliary router loss is part of it.
"""

from __future__ import annotations

import torch


CHUNK_ELEMENTS = 2**22
"""Logits whose softmax is taken at once. In float32 they are 16 MiB, few enough for the cache of a CPU, and enough to fill a
GPU; a few such pieces are all that the loss holds besides the logits."""


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of logits [tokens, vocabulary], with the softmax in float32 a chunk of tokens at a time.

    The gradient takes the place of the logits in memory as it is formed, so that a large vocabulary never needs a
    second [tokens, vocabulary] tensor, nor one in float32.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        gradient = logits.detach()
        total = torch.zeros((), dtype=torch.float32 if logits.dtype != torch.float64 else torch.float64)
        total = total.to(logits.device)
        chunk_tokens = max(1, CHUNK_ELEMENTS // logits.shape[1])
        for start in range(0, logits.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk = gradient[rows]
            chunk = chunk.float() if chunk.dtype != torch.float64 else chunk
            log_probabilities = torch.log_softmax(chunk, dim=-1)
            index = targets[rows].clamp(min=0).unsqueeze(1)
            counted = (targets[rows] >= 0).unsqueeze(1)
            total -= (log_probabilities.gather(1, index) * counted).sum()
            derivative = log_probabilities.exp_()
            derivative.scatter_add_(1, index, torch.full_like(index, -1, dtype=derivative.dtype))
            gradient[rows] = derivative.mul_(counted)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, gradient_of_sum):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(gradient_of_sum), None


def summed_token_loss(
    logits: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Cross-entropy of each token given those before it, summed over the tokens that count.

    Args:
        logits (`torch.Tensor`): [samples, tokens, vocabulary]; overwritten with their gradient.
        input_ids (`torch.Tensor`): [samples, tokens].
        attention_mask (`torch.Tensor`): 1 for tokens, 0 for padding on the right, [samples, tokens].

    Returns:
        `tuple[torch.Tensor, int]`: the sum in nats, and how many tokens were predicted.
    """
    targets = torch.full_like(input_ids, -1)
    targets[:, :-1] = torch.where(attention_mask[:, 1:].bool(), input_ids[:, 1:], -1)
    targets = targets.to(logits.device)
    loss = _SummedCrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
    return loss, int((targets >= 0).sum())
