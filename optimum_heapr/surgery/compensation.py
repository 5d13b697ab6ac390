# Licensed under the Apache License, Version 2.0
"""Compensation: fold what the removed atomic experts did into the `down_proj` of those that stay, without training.

The output of an expert is `W h` (`W` [H, I] the `down_proj`, `h` [I] the activations of a token, `r` the router
weight). With the atoms K kept and R removed, the change of the kept columns that loses least of the output over the
calibration tokens, E |r (W h - W' h_K)|^2, is the regression of the removed activations on the kept ones:

    W' = W_K + W_R C,    C = A_RK (A_KK + lambda I)^-1,    A = E[r^2 h h^T],    lambda = ridge * mean(diag A).

(Hassibi & Stork 1993, "Second order derivatives for network pruning: optimal brain surgeon"; per layer, with the
Gram matrix of the inputs: Frantar & Alistarh 2022, "Optimal Brain Compression".) The loss of the output for weights
changed by D is `trace(D A D^T)`, so it can be measured from A alone; here it is given relative to `trace(W A W^T)`.

Few tokens. A regression over about as many atoms as tokens fits noise: with a ridge of 0.01 the compensated expert is
then usually WORSE than plain removal on tokens it has not seen, though always better on those it has. So the ridge is
never below I / n for n tokens, which is `lambda = trace(A) / n`: as if, besides the n tokens, each atom had once been
active alone, as strongly as a whole typical token. See `ridge_for_tokens`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..criteria.elimination import ridge_for_tokens
from .regression import (
    at_least_float32,
    block_of,
    check_gram,
    check_kept,
    check_ridge,
    columns_of,
    compensation_weights,
    complement,
    solve,
    squares,
)


__all__ = ["CompensationResult", "compensate", "compensate_experts", "compensation_weights", "ridge_for_tokens"]

# Experts of equal width that are worked on together; bounds the memory to about 50 MB for each at H = 2048, I = 768.
EXPERTS_AT_ONCE_CPU = 4
EXPERTS_AT_ONCE_ACCELERATOR = 32


@dataclass(frozen=True)
class CompensationResult:
    """One pruned expert.

    Attributes:
        down_proj: Tensor [H, w] in the type and on the device of the original; column j belongs to `kept[j]`.
        error_before: relative squared error of the expert's output after plain removal, over the calibration tokens.
            0 is no loss, 1 is an output of zero. 0 as well where the calibration saw no output at all.
        error_after: the same for `down_proj` as it is here, rounding included; never above `error_before`.
        ridge: the ridge used, in units of mean(diag A); None if `down_proj` is the plain selection of columns.
    """

    down_proj: torch.Tensor
    error_before: float
    error_after: float
    ridge: float | None


def compensate(
    down_proj: torch.Tensor,
    activation_gram: torch.Tensor,
    kept: torch.Tensor,
    token_count: int,
    ridge: float = 0.01,
) -> CompensationResult:
    """Keep the columns `kept` of one expert's `down_proj`, changed so that they make up for the others.

    Falls back to plain removal, `down_proj[:, kept]` bit by bit, when nothing or everything is removed, when no token
    reached the expert, when the regression cannot be solved, and when its result, rounded to the type of `down_proj`,
    does not lower the error on A. Biases are not concerned: what they add to the output does not depend on `h`.

    Args:
        down_proj: W [H, I], any floating-point type.
        activation_gram: A [I, I] = E[r^2 h h^T], symmetric positive semidefinite, on the device of `down_proj`.
        kept: LongTensor [w], 0 <= w <= I, distinct; in any order.
        token_count: how many tokens A is the mean of.
        ridge: least ridge, in units of mean(diag A); raised by `ridge_for_tokens`. At least 0.

    Returns:
        The new weights and the relative error of the expert's output without and with compensation.

    Raises:
        ValueError: shapes do not match, indices are not distinct or out of range, a value is not finite, or
            `token_count` or `ridge` is negative.
    """
    return compensate_experts([down_proj], [activation_gram], [kept], [token_count], ridge)[0]


def compensate_experts(
    down_projs: Sequence[torch.Tensor],
    activation_grams: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
    token_counts: Sequence[int],
    ridge: float = 0.01,
) -> list[CompensationResult]:
    """`compensate` for many experts: those of equal shapes and width are solved together.

    Args, errors: as in `compensate`, one entry per expert. Stacked tensors ([B, H, I], [B, I, I]) are sequences too.

    Returns:
        One result per expert, in the order given.
    """
    lengths = [len(down_projs), len(activation_grams), len(kept), len(token_counts)]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"down_projs, activation_grams, kept and token_counts have {lengths} entries; "
            "they must have one for each expert."
        )
    check_ridge(ridge)
    groups = defaultdict(list)
    for index, (weight, gram, selected, tokens) in enumerate(zip(down_projs, activation_grams, kept, token_counts)):
        _check_expert(weight, gram, selected, tokens)
        groups[weight.shape, len(selected), weight.dtype, weight.device, gram.dtype].append(index)

    results: list[CompensationResult | None] = [None] * len(down_projs)
    for members in groups.values():
        device = down_projs[members[0]].device
        size = EXPERTS_AT_ONCE_CPU if device.type == "cpu" else EXPERTS_AT_ONCE_ACCELERATOR
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            outcomes = _compensate_group(
                torch.stack([down_projs[i] for i in chunk]),
                torch.stack([activation_grams[i] for i in chunk]),
                torch.stack([kept[i].to(device) for i in chunk]),
                [int(token_counts[i]) for i in chunk],
                ridge,
            )
            for index, outcome in zip(chunk, outcomes):
                results[index] = outcome
    return results


def _compensate_group(
    down_proj: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, token_counts: list[int], ridge: float
) -> list[CompensationResult]:
    """Experts of one shape and width: down_proj [b, H, I], gram [b, I, I], kept [b, w]."""
    atoms, width = down_proj.shape[2], kept.shape[1]
    removed = complement(kept, atoms)
    plain = columns_of(down_proj, kept)
    if width == atoms:
        return [CompensationResult(weight.clone(), 0.0, 0.0, None) for weight in plain]

    gram = at_least_float32(gram)
    gram = gram.double() if down_proj.dtype == torch.float64 else gram
    weight = down_proj.to(gram.dtype)
    products = squares(weight)  # of all columns; an error is the sum of these times a Gram matrix, trace(W A W^T)
    total = _energy(products, gram)
    lost, of_lost = columns_of(weight, removed), block_of(products, removed, removed)
    among_removed = block_of(gram, removed, removed)
    before = _relative(_energy(of_lost, among_removed), total)
    if width == 0:
        return [CompensationResult(new.clone(), error, error, None) for new, error in zip(plain, before.tolist())]

    ridges = [ridge_for_tokens(ridge, atoms, tokens) for tokens in token_counts]
    added = torch.tensor(ridges, dtype=gram.dtype, device=gram.device)
    weights, usable = solve(gram, kept, removed, added)
    usable &= torch.tensor(token_counts, device=gram.device) > 0
    change = lost @ weights
    exact = columns_of(weight, kept) + change
    compensated = exact.to(down_proj.dtype)
    # The covariance of what is left of the removed activations, h_R - C h_K.
    among_kept, between = block_of(gram, kept, kept), block_of(gram, removed, kept)
    left = among_removed - weights @ between.mT - (between - weights @ among_kept) @ weights.mT
    energy = _energy(of_lost, left)
    if compensated.dtype != exact.dtype:
        # The error is to be that of what is saved. With the kept activations, what is left goes together by lambda C.
        rounding, strength = compensated.to(exact.dtype) - exact, added * gram.diagonal(dim1=1, dim2=2).mean(dim=1)
        energy += _energy(squares(rounding), among_kept) - 2 * strength * (rounding * change).sum(dim=(1, 2))
    after = _relative(energy, total)
    usable &= (after <= before) & (compensated != plain).any(2).any(1)  # False for NaN as well
    return [
        CompensationResult(new.clone(), error_before, error_after if use else error_before, used if use else None)
        for new, error_before, error_after, used, use in zip(
            torch.where(usable[:, None, None], compensated, plain),
            before.tolist(),
            after.tolist(),
            ridges,
            usable.tolist(),
        )
    ]


def _energy(products: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """trace(W A W^T) [b] = E |r W h|^2 for products W^T W and gram, both [b, I, I]; rounding below zero is cut off."""
    return (products * gram).sum(dim=(1, 2)).clamp(min=0)


def _relative(energy: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return torch.where(total > 0, energy / total, 0)


def _check_expert(down_proj: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, token_count: int) -> None:
    if down_proj.dim() != 2:
        raise ValueError(
            f"down_proj has shape {tuple(down_proj.shape)}; it must be [hidden, atoms]. Pass one expert at a time, or "
            "use compensate_experts."
        )
    atoms = down_proj.shape[1]
    if tuple(gram.shape) != (atoms, atoms):
        raise ValueError(
            f"activation_gram has shape {tuple(gram.shape)}; for a down_proj of shape {tuple(down_proj.shape)} "
            f"it must be ({atoms}, {atoms}). A transposed down_proj must be passed as [hidden, atoms]."
        )
    if down_proj.numel() and not all(bound.isfinite() for bound in down_proj.aminmax()):
        raise ValueError("down_proj has values that are not finite; every value must be. Check the checkpoint.")
    check_gram(gram)
    check_kept(kept, atoms)
    if token_count < 0:
        raise ValueError(f"token_count is {token_count}; it must be at least 0. Pass how many tokens A averages over.")
