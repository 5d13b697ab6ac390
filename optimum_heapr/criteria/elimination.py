# Licensed under the Apache License, Version 2.0
"""Greedy elimination of atomic experts: in which order to remove the neurons of an expert, and what each step costs.

The loss model. Let `h` [I] be the activations of one expert for one token, `r` the router weight, `W` [H, I] the
`down_proj` and `g` [H] the gradient of the loss at the expert's output. A change of the weights by `W T` (`T` [I, I]:
what happens to each column, in terms of the columns that were there) changes the block's output by `r W T h`. With
activations and gradients taken as independent (the product form that HEAPr and K-FAC use), the second-order increase
of the loss is

    loss(T) = 1/2 * trace(T A T^T M),    A = E[r^2 h h^T],    M = E[(dL/dh) (dL/dh)^T] = W^T E[g g^T] W.

Nothing below depends on how the router weight is shared out between the two factors.

Removing the set R and letting the kept atoms K make up for it means `T[R, R] = -1` and `T[R, K] = C`. The best `C` is
the least-squares regression `C = A_RK A_KK^-1` of the removed activations on the kept ones. What it leaves over has
the covariance `[(A^-1)_RR]^-1`, whatever M is. One atom k therefore costs

    1/2 * M_kk / [A^-1]_kk,

the saliency of the optimal brain surgeon (Hassibi & Stork 1993, "Second order derivatives for network pruning:
optimal brain surgeon"), here with the Hessian's Kronecker factors in place of the full Hessian. The regression is
`h_k ~ sum_j c_j h_j` with `c_j = -[A^-1]_kj / [A^-1]_kk`, so column j of `down_proj` becomes `w_j + c_j w_k`; the
gradient with respect to `h_j`, which is `g . w_j`, gains `c_j` times the one of `h_k`. With
`u = [A^-1]_k: / [A^-1]_kk`,

    M    <- (I - u e_k^T) M (I - e_k u^T)          row and column k become 0
    A^-1 <- A^-1 - [A^-1]_:k [A^-1]_k: / [A^-1]_kk  row and column k become 0; the rest is (A without k)^-1.

What one step leaves over is uncorrelated with every atom that is still there, so the costs of the steps add up:
the sum of the first s costs IS `loss(T)` for the first s atoms removed together with optimal compensation.
"""

from dataclasses import dataclass

import torch

from ..utils.scratch import Scratch


__all__ = ["Elimination", "greedy_elimination", "ridge_for_tokens"]

# Rank-one updates are collected and applied to the I x I matrices this many at a time, as one matrix product. Between
# two products only what the next choice needs is kept up to date: both diagonals, and the row of the chosen atom.
STEPS_PER_BLOCK = 64
# Experts worked on together. On a CPU enough of them to hide the cost of starting an operation, few enough numbers in a
# matrix of each to stay in the cache; elsewhere enough to fill the device within a few GB of memory at I = 768.
EXPERTS_AT_ONCE_CPU = 4
NUMBERS_AT_ONCE_CPU = 8 * 768**2
EXPERTS_AT_ONCE_ACCELERATOR = 128


@dataclass(frozen=True)
class Elimination:
    """Removal order and cost curve of B experts of I atoms each.

    Attributes:
        order: LongTensor [B, I]; `order[b, s]` is the atom of expert b that step s removes. To remove n atoms of
            expert b, remove `order[b, :n]` and keep `order[b, n:]`.
        cost: Tensor [B, I]; `cost[b, s] >= 0` is the loss increase that step s adds, given the steps before it. In the
            units of the loss whose gradients were given, per token over which the Gram matrices were averaged.
    """

    order: torch.Tensor
    cost: torch.Tensor

    @property
    def monotone_cost(self) -> torch.Tensor:
        """Running maximum of `cost` [B, I]: never falls along the order, so one threshold cuts every expert once.

        The raw cost can fall, because compensation changes the columns of the atoms that remain.
        """
        return self.cost.cummax(dim=1).values


def greedy_elimination(
    activation_gram: torch.Tensor,
    gradient_gram: torch.Tensor,
    ridge: float | torch.Tensor = 0.01,
    *,
    dtype: torch.dtype = torch.float32,
    experts_at_once: int | None = None,
) -> Elimination:
    """Remove the atoms of each expert one by one, always the one that costs least with optimal compensation.

    The whole curve is computed, so any pruning ratio is a look-up in it afterwards. Takes about `3 * I^3`
    floating-point operations per expert.

    Args:
        activation_gram: A [B, I, I] = E[r^2 h h^T] per expert, symmetric positive semidefinite.
        gradient_gram: M [B, I, I] = E[(dL/dh) (dL/dh)^T] per expert, symmetric positive semidefinite, same device.
        ridge: `ridge * mean(diag A)` is added to the diagonal of A, per expert; without unit, at least 0; one number,
            or a tensor [B] of one for each expert. It acts as uncorrelated activation added to every atom: it bounds
            the compensation where A is (nearly) singular, and is part of the cost. Use what the compensation will
            use, since under a small ridge an expert that few tokens reached looks free to prune; and divide the cost
            by `1 + ridge`, the factor by which it raises mean(diag A), before experts of different ridge are
            compared. Where A cannot be factored all the same, the ridge of that expert is raised tenfold until it can.
        dtype: floating-point type of the computation and of the cost: `torch.float32` or `torch.float64`.
        experts_at_once: experts that are worked on together; bounds the extra memory to about four I x I matrices
            for each. By default chosen by device. The result does not depend on it, save for the rounding of sums.

    Returns:
        The removal order and the cost of each step. Equal costs are broken by the lowest index. Experts whose A is
        all zero (no token reached them) get the order 0, 1, 2, ... and zero cost. Inputs are left as they are.

    Raises:
        ValueError: shapes do not match, a value is not finite, a diagonal is negative, A is far from positive
            semidefinite, or `ridge`, `dtype` or `experts_at_once` is out of range.
    """
    _check_arguments(activation_gram, gradient_gram, ridge, dtype, experts_at_once)
    experts, atoms, _ = activation_gram.shape
    device = activation_gram.device
    order = torch.arange(atoms, device=device).repeat(experts, 1)
    cost = torch.zeros(experts, atoms, dtype=dtype, device=device)
    if experts_at_once is None:
        on_cpu = max(EXPERTS_AT_ONCE_CPU, NUMBERS_AT_ONCE_CPU // max(atoms, 1) ** 2)
        experts_at_once = on_cpu if device.type == "cpu" else EXPERTS_AT_ONCE_ACCELERATOR
    reached = (activation_gram.diagonal(dim1=1, dim2=2).sum(dim=1) > 0).nonzero().flatten()
    ridges = torch.as_tensor(ridge, dtype=dtype, device=device).expand(experts)
    scratch = Scratch(dtype, device)
    for chunk in reached.split(experts_at_once) if len(reached) else ():
        grams = scratch("grams", 2, len(chunk), atoms, atoms)
        for expert, index in enumerate(chunk.tolist()):
            grams[0, expert], grams[1, expert] = activation_gram[index], gradient_gram[index]
        order[chunk], cost[chunk] = _eliminate(grams, ridges[chunk], scratch)
    return Elimination(order=order, cost=cost)


def ridge_for_tokens(ridge: float, atoms: int, token_count: int) -> float:
    """The ridge for an expert of `atoms` atoms that `token_count` tokens reached: `max(ridge, atoms / token_count)`.

    Unit: mean(diag A). With 20 tokens per atom it is at least 0.05; with fewer tokens than atoms it is above 1, and
    compensation fades towards plain removal. No token at all counts as one: the value stays finite, and `compensate`
    does not use it.
    """
    return max(ridge, atoms / max(token_count, 1))


def _eliminate(grams: torch.Tensor, ridge: torch.Tensor, scratch: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and cost, both [b, I], of experts that tokens did reach; `grams` are A and M [2, b, I, I], and are overwritten.

    Delayed updates: within a block the matrices stay as they were at its start, and the current ones are

        A^-1 = inverse - F^T F
        M    = gradient_gram - F^T Q - Q^T F

    with one row of F and Q for each step: `f = [A^-1]_k: / sqrt([A^-1]_kk)`, and `q` such that the update of M above is
    `f q^T + q f^T`. At the end of a block the products are applied, and the atoms removed in it are dropped.
    """
    # Both matrices are brought to mean diagonal 1: squared gradients can be too small for float32 arithmetic.
    scale = _normalize_(grams)
    variance = grams[0].diagonal(dim1=1, dim2=2).clone()
    ridge_used = _invert_regularized_(grams[0], ridge, scratch)
    _, experts, atoms, _ = grams.shape
    device = grams.device
    # The residual of an atom, 1 / [A^-1]_kk, is at most its own variance: a floor for the diagonal that holds in exact
    # arithmetic and keeps rounding from ever making it zero or negative.
    inverse_floor = (variance + ridge_used[:, None]).reciprocal()
    labels = torch.arange(atoms, device=device).repeat(experts, 1)  # original index of each remaining atom, ascending
    both, order, cost = grams, [], []

    while (remaining := labels.shape[1]) > 0:
        steps = min(STEPS_PER_BLOCK, remaining)
        updates = scratch("updates", experts, steps, 2, remaining)  # f and q of each step
        inverse_diagonal, gradient_diagonal = both.diagonal(dim1=2, dim2=3)
        inverse_diagonal, gradient_diagonal = inverse_diagonal.maximum(inverse_floor), gradient_diagonal.clamp(min=0)
        first_rows = torch.arange(0, 2 * experts * remaining, remaining, device=device).view(2, experts, 1)
        removed = []
        for step in range(steps):
            # The first, so the lowest index, among equals.
            step_cost, chosen = (gradient_diagonal / inverse_diagonal).min(dim=1, keepdim=True)
            removed.append(chosen)
            cost.append(step_cost)

            rows = both.view(-1, remaining).index_select(0, (first_rows + chosen).view(-1))
            inverse_row, gradient_row = rows.view(2, experts, 1, remaining)
            if step:
                done = updates[:, :step]
                of_chosen = done.gather(3, chosen[:, :, None, None].expand(-1, step, 2, 1)).view(experts, step, 2)
                inverse_row.baddbmm_(of_chosen[:, None, :, 0].contiguous(), done[:, :, 0], alpha=-1)
                swapped = of_chosen.flip(2).view(experts, 1, 2 * step)
                gradient_row.baddbmm_(swapped, done.view(experts, 2 * step, remaining), alpha=-1)
            root = inverse_diagonal.gather(1, chosen).sqrt_()
            f, q = updates[:, step].unbind(1)
            torch.div(inverse_row[:, 0], root, out=f)
            torch.div(gradient_row[:, 0], root, out=q).addcmul_(f, step_cost, value=-0.5)
            inverse_diagonal.addcmul_(f, f, value=-1)
            torch.maximum(inverse_diagonal, inverse_floor, out=inverse_diagonal)
            gradient_diagonal.addcmul_(f, q, value=-2).clamp_(min=0).scatter_(1, chosen, torch.inf)

        removed = torch.cat(removed, dim=1)
        order.append(labels.gather(1, removed))
        is_removed = torch.zeros(labels.shape, dtype=torch.uint8, device=device).scatter_(1, removed, 1)
        # Stable, so that labels stay ascending and "lowest index" keeps its meaning.
        left = is_removed.argsort(dim=1, stable=True)[:, : remaining - steps]
        labels, inverse_floor = labels.gather(1, left), inverse_floor.gather(1, left)
        both, updates = _reduced(both, updates, left, scratch)
        both[0].baddbmm_(updates[:, :, 0].mT, updates[:, :, 0], alpha=-1)
        both[1].baddbmm_(updates.flatten(1, 2).mT, updates.flip(2).flatten(1, 2), alpha=-1)

    return torch.cat(order, dim=1), torch.cat(cost, dim=1) * (0.5 * scale.prod(0))[:, None]


def _reduced(
    matrices: torch.Tensor, updates: torch.Tensor, index: torch.Tensor, scratch: Scratch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns `index` [b, m] of matrices [2, b, n, n], and those columns of updates [b, s, 2, n]; the matrices stay in
    their place."""
    # Whole rows, then columns, of one matrix after another: `gather` looks up an index for each number. All that is written
    # comes before what is still to be read.
    size, left = index.shape[1], scratch("updates left", *updates.shape[:3], index.shape[1])
    result = matrices.view(-1)[: matrices[..., 0, 0].numel() * size**2].view(*matrices.shape[:2], size, size)
    rows = scratch("rows", size, matrices.shape[3])
    for kind, of_kind in zip(matrices, result):
        for matrix, own, of_matrix in zip(kind, index, of_kind):
            torch.index_select(matrix, 0, own, out=rows)
            torch.index_select(rows, 1, own, out=of_matrix)
    for of_expert, own, of_left in zip(updates, index, left):
        torch.index_select(of_expert, 2, own, out=of_left)
    return result, left


def _normalize_(grams: torch.Tensor) -> torch.Tensor:
    """Divide each matrix of grams [2, b, I, I] by the mean of its diagonal, in place; returns those means [2, b]."""
    scale = grams.diagonal(dim1=2, dim2=3).mean(dim=2)
    grams.div_(torch.where(scale > 0, scale, 1)[:, :, None, None])
    return scale


def _invert_regularized_(gram: torch.Tensor, ridge: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Puts the inverse of gram [b, I, I] + ridge * identity in its place; returns the ridge used [b]: more than `ridge` only
    where needed."""
    ridge_used = ridge
    # Rounding alone can push the lowest eigenvalue about this far below zero.
    least = gram.shape[1] * torch.finfo(gram.dtype).eps
    tried_all = (10 * ridge).clamp(min=1)
    factor, info = scratch("factor", *gram.shape), torch.empty(len(gram), dtype=torch.int32, device=gram.device)
    diagonal = gram.diagonal(dim1=1, dim2=2).clone()
    while True:
        gram.diagonal(dim1=1, dim2=2).copy_(diagonal + ridge_used[:, None])
        torch.linalg.cholesky_ex(gram, out=(factor.mT, info))  # LAPACK counts columns first
        failed = info != 0
        if not failed.any():
            torch.cholesky_inverse(factor.mT, out=gram.mT)
            return ridge_used
        if (ridge_used > tried_all)[failed].any():
            raise ValueError(
                f"activation_gram of {int(failed.sum())} expert(s) is not positive semidefinite, even with "
                f"{ridge_used[failed].max().item():.3g} times the mean of its diagonal added; E[r^2 h h^T] always is. "
                "Accumulate it as a sum of outer products, in float32 or better."
            )
        ridge_used = torch.where(failed, (10 * ridge_used).clamp(min=least), ridge_used)


def _check_arguments(
    activation_gram: torch.Tensor,
    gradient_gram: torch.Tensor,
    ridge: float | torch.Tensor,
    dtype: torch.dtype,
    experts_at_once: int | None,
) -> None:
    shape = tuple(activation_gram.shape)
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(
            f"activation_gram has shape {shape}; it must be [experts, atoms, atoms]. "
            "For a single expert pass activation_gram[None]."
        )
    if tuple(gradient_gram.shape) != shape:
        raise ValueError(
            f"gradient_gram has shape {tuple(gradient_gram.shape)}; it must be that of activation_gram, {shape}. "
            "Collect both over the same experts and atoms."
        )
    ridges = torch.as_tensor(ridge, dtype=torch.float32)
    if tuple(ridges.shape) not in ((), shape[:1]):
        raise ValueError(
            f"ridge has shape {tuple(ridges.shape)}; it must be one number or one for each of the {shape[0]} experts. "
            "Use 0.01 unless you measured better."
        )
    wrong = ridges[~(ridges.isfinite() & (ridges >= 0))]
    if wrong.numel():
        raise ValueError(
            f"ridge is {wrong[0].item()}; it must be finite and at least 0. Use 0.01 unless you measured better."
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}; it must be torch.float32 or torch.float64. Use torch.float32 if unsure.")
    if experts_at_once is not None and experts_at_once < 1:
        raise ValueError(f"experts_at_once is {experts_at_once}; it must be at least 1. Leave it out if unsure.")
    for name, gram in (("activation_gram", activation_gram), ("gradient_gram", gradient_gram)):
        if gram.numel() and not all(bound.isfinite() for bound in gram.aminmax()):
            raise ValueError(
                f"{name} has values that are not finite; every value must be. "
                "Check the calibration pass for overflow (a 16-bit model may need a smaller loss scale) and repeat it."
            )
        lowest = gram.diagonal(dim1=1, dim2=2).min().item() if gram.numel() else 0.0
        if lowest < 0:
            raise ValueError(
                f"{name} has {lowest:.3g} on its diagonal; a mean of squares is at least 0. "
                "Check that the argument is the Gram matrix itself, not its inverse or a difference of two."
            )
