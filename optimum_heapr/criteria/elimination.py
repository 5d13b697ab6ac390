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


__all__ = ["Elimination", "greedy_elimination", "ridge_for_tokens"]

# Rank-one updates are collected and applied to the I x I matrices this many at a time, as one matrix product. Between
# two products only what the next choice needs is kept up to date: both diagonals, and the row of the chosen atom.
STEPS_PER_BLOCK = 64
# Experts worked on together. On a CPU enough of them to hide the cost of starting an operation, few enough to stay in
# the cache; elsewhere enough to fill the device within a few GB of memory at I = 768.
EXPERTS_AT_ONCE_CPU = 8
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
        experts_at_once: experts that are worked on together; bounds the extra memory to about five I x I matrices
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
        experts_at_once = EXPERTS_AT_ONCE_CPU if device.type == "cpu" else EXPERTS_AT_ONCE_ACCELERATOR
    reached = (activation_gram.diagonal(dim1=1, dim2=2).sum(dim=1) > 0).nonzero().flatten()
    ridges = torch.as_tensor(ridge, dtype=dtype, device=device).expand(experts)
    for chunk in reached.split(experts_at_once) if len(reached) else ():
        order[chunk], cost[chunk] = _eliminate(
            activation_gram[chunk].to(dtype), gradient_gram[chunk].to(dtype), ridges[chunk]
        )
    return Elimination(order=order, cost=cost)


def ridge_for_tokens(ridge: float, atoms: int, token_count: int) -> float:
    """The ridge for an expert of `atoms` atoms that `token_count` tokens reached: `max(ridge, atoms / token_count)`.

    Unit: mean(diag A). With 20 tokens per atom it is at least 0.05; with fewer tokens than atoms it is above 1, and
    compensation fades towards plain removal. No token at all counts as one: the value stays finite, and `compensate`
    does not use it.
    """
    return max(ridge, atoms / max(token_count, 1))


def _eliminate(
    activation_gram: torch.Tensor, gradient_gram: torch.Tensor, ridge: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and cost, both [b, I], of experts that tokens did reach. Overwrites both matrices [b, I, I].

    Delayed updates: within a block the matrices stay as they were at its start, and the current ones are

        A^-1 = inverse - factors^T factors                                       one row of `factors` per step
        M    = gradient_gram - update_left^T update_right                        two rows of each per step

    At the end of a block the products are applied, and the atoms removed in it are dropped from the matrices.
    """
    # Both matrices are brought to mean diagonal 1: squared gradients can be too small for float32 arithmetic.
    activation_scale, gradient_scale = _normalize_(activation_gram), _normalize_(gradient_gram)
    inverse, ridge_used = _regularized_inverse(activation_gram, ridge)
    experts, atoms, _ = inverse.shape
    dtype, device = inverse.dtype, inverse.device
    # The residual of an atom, 1 / [A^-1]_kk, is at most its own variance: a floor for the diagonal that holds in exact
    # arithmetic and keeps rounding from ever making it zero or negative.
    inverse_floor = (activation_gram.diagonal(dim1=1, dim2=2) + ridge_used[:, None]).reciprocal()
    labels = torch.arange(atoms, device=device).repeat(experts, 1)  # original index of each remaining atom, ascending
    order, cost = [], []

    while (remaining := labels.shape[1]) > 0:
        steps = min(STEPS_PER_BLOCK, remaining)
        factors = torch.empty(experts, steps, remaining, dtype=dtype, device=device)
        update_left = torch.empty(experts, 2 * steps, remaining, dtype=dtype, device=device)
        update_right = torch.empty_like(update_left)
        removed = torch.zeros(experts, remaining, dtype=torch.bool, device=device)
        inverse_diagonal = inverse.diagonal(dim1=1, dim2=2).maximum(inverse_floor)
        gradient_diagonal = gradient_gram.diagonal(dim1=1, dim2=2).clamp(min=0)
        for step in range(steps):
            saliency = (gradient_diagonal / inverse_diagonal).masked_fill_(removed, torch.inf)
            step_cost, chosen = saliency.min(dim=1, keepdim=True)  # the first, so the lowest index, among equals
            order.append(labels.gather(1, chosen))
            cost.append(step_cost)

            inverse_row = _current_row(inverse, factors[:, :step], factors[:, :step], chosen)
            gradient_row = _current_row(gradient_gram, update_left[:, : 2 * step], update_right[:, : 2 * step], chosen)
            pivot = inverse_diagonal.gather(1, chosen)
            direction = inverse_row / pivot  # u
            # (I - u e_k^T) M (I - e_k u^T) = M - u half^T - half u^T
            half = torch.addcmul(gradient_row, direction, gradient_diagonal.gather(1, chosen), value=-0.5)
            torch.div(inverse_row, pivot.sqrt(), out=factors[:, step])
            update_left[:, 2 * step], update_left[:, 2 * step + 1] = direction, half
            update_right[:, 2 * step], update_right[:, 2 * step + 1] = half, direction
            inverse_diagonal.addcmul_(inverse_row, direction, value=-1)
            torch.maximum(inverse_diagonal, inverse_floor, out=inverse_diagonal)
            gradient_diagonal.addcmul_(direction, half, value=-2).clamp_(min=0)
            removed.scatter_(1, chosen, True)

        # Stable, so that labels stay ascending and "lowest index" keeps its meaning.
        left = removed.to(torch.uint8).argsort(dim=1, stable=True)[:, : remaining - steps]
        labels, inverse_floor = labels.gather(1, left), inverse_floor.gather(1, left)
        columns = left[:, None, :]
        factors = factors.gather(2, columns.expand(-1, steps, -1))
        update_left = update_left.gather(2, columns.expand(-1, 2 * steps, -1))
        update_right = update_right.gather(2, columns.expand(-1, 2 * steps, -1))
        inverse = _submatrix(inverse, left).baddbmm_(factors.mT, factors, alpha=-1)
        gradient_gram = _submatrix(gradient_gram, left).baddbmm_(update_left.mT, update_right, alpha=-1)

    scale = 0.5 * activation_scale * gradient_scale
    return torch.cat(order, dim=1), torch.cat(cost, dim=1) * scale[:, None]


def _current_row(start: torch.Tensor, left: torch.Tensor, right: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Row `chosen` [b, 1] of `start - left^T right`, as [b, n], for start [b, n, n] and left, right [b, s, n]."""
    experts, steps, size = left.shape
    row = start[torch.arange(experts, device=start.device), chosen[:, 0]]
    if steps == 0:
        return row
    coefficients = left.gather(2, chosen[:, None, :].expand(-1, steps, -1)).mT  # [b, 1, s]
    return torch.baddbmm(row[:, None], coefficients, right, alpha=-1)[:, 0]


def _submatrix(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows and columns `index` [b, m] of matrix [b, n, n], as a new [b, m, m]."""
    # Whole rows, then columns, of one matrix after another: `gather` looks up an index for each number.
    return torch.stack([part.index_select(0, own).index_select(1, own) for part, own in zip(matrix, index)])


def _normalize_(gram: torch.Tensor) -> torch.Tensor:
    """Divide each matrix of gram [b, I, I] by the mean of its diagonal, in place; returns those means [b]."""
    scale = gram.diagonal(dim1=1, dim2=2).mean(dim=1)
    gram.div_(torch.where(scale > 0, scale, 1)[:, None, None])
    return scale


def _regularized_inverse(gram: torch.Tensor, ridge: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of gram [b, I, I] + ridge * identity, and the ridge used [b]: more than `ridge` only where needed."""
    ridge_used = ridge
    # Rounding alone can push the lowest eigenvalue about this far below zero.
    least = gram.shape[1] * torch.finfo(gram.dtype).eps
    tried_all = (10 * ridge).clamp(min=1)
    while True:
        regularized = gram.clone()
        regularized.diagonal(dim1=1, dim2=2).add_(ridge_used[:, None])
        factor, info = torch.linalg.cholesky_ex(regularized)
        failed = info != 0
        if not failed.any():
            return torch.cholesky_inverse(factor), ridge_used
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
        if not torch.isfinite(gram).all():
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
