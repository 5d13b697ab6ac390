# Licensed under the Apache License, Version 2.0
"""The regression of removed activations on those that stay, for many experts of one shape at once; batches of matrices."""

import torch


PANEL_CPU = 192


def compensation_weights(
    activation_gram: torch.Tensor, kept: torch.Tensor, ridge: float | torch.Tensor = 0.01
) -> torch.Tensor:
    """The regression C = A_RK (A_KK + lambda I)^-1 of the removed activations on the kept ones.

    Args:
        activation_gram: A [I, I] or [B, I, I], symmetric positive semidefinite.
        kept: indices of the kept atoms, LongTensor [w] or [B, w], distinct; in any order.
        ridge: lambda in units of mean(diag A), which is taken over all atoms; a number, or a tensor [B]. At least 0.

    Returns:
        C [I - w, w] or [B, I - w, w] in float32, or float64 if A is. Row i belongs to the i-th removed atom in
        ascending order, column j to `kept[j]`. The compensated weights are `W[:, kept] + W[:, removed] @ C`.

    Raises:
        ValueError: shapes do not match, indices are not distinct or out of range, a value is not finite, the ridge is
            negative, or A_KK + lambda I cannot be factored even in float64.
    """
    grams, indices = (activation_gram[None], kept[None]) if activation_gram.dim() == 2 else (activation_gram, kept)
    if grams.dim() != 3 or grams.shape[1] != grams.shape[2] or indices.dim() != 2 or len(indices) != len(grams):
        raise ValueError(
            f"activation_gram has shape {tuple(activation_gram.shape)} and kept {tuple(kept.shape)}; they must be "
            "[atoms, atoms] and [width], or [experts, atoms, atoms] and [experts, width]."
        )
    check_gram(grams)
    for row in indices:
        check_kept(row, grams.shape[1])
    ridges = torch.as_tensor(ridge, dtype=torch.float32, device=grams.device).expand(len(grams))
    for value in ridges.tolist():
        check_ridge(value)
    indices = indices.to(grams.device)
    weights, solved = solve(at_least_float32(grams), indices, complement(indices, grams.shape[1]), ridges)
    if not solved.all():
        raise ValueError(
            f"activation_gram of {int((~solved).sum())} expert(s) is singular over the kept atoms with ridge "
            f"{ridges[~solved].min().item():.3g}, even in float64; it must be positive definite. Use a larger ridge."
        )
    return weights[0] if activation_gram.dim() == 2 else weights


def solve(
    gram: torch.Tensor, kept: torch.Tensor, removed: torch.Tensor, ridge: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """C [b, I - w, w] for gram [b, I, I], and whether it could be solved, bool [b]. Zeros where it could not."""
    diagonal_added = ridge.to(gram.dtype) * gram.diagonal(dim1=1, dim2=2).mean(dim=1)
    among_kept = block_of(gram, kept, kept)
    among_kept.diagonal(dim1=1, dim2=2).add_(diagonal_added[:, None])
    factor, info = torch.linalg.cholesky_ex(among_kept)
    weights = torch.cholesky_solve(block_of(gram, kept, removed), factor).mT
    solved = (info == 0) & weights.isfinite().all(dim=2).all(dim=1)
    if gram.dtype != torch.float64 and not solved.all():
        again = (~solved).nonzero().flatten()
        precise, solved_again = solve(gram[again].double(), kept[again], removed[again], ridge[again])
        weights[again] = precise.to(weights.dtype)
        solved[again] = solved_again
    return torch.where(solved[:, None, None], weights, 0), solved


def complement(kept: torch.Tensor, atoms: int) -> torch.Tensor:
    """Indices [b, I - w] that are not in kept [b, w], ascending."""
    is_kept = torch.zeros(len(kept), atoms, dtype=torch.uint8, device=kept.device).scatter_(1, kept, 1)
    return is_kept.argsort(dim=1, stable=True)[:, : atoms - kept.shape[1]]


def columns_of(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns index [b, m] of matrix [b, n, I], as a new [b, n, m]."""
    return torch.stack([own.index_select(1, columns) for own, columns in zip(matrix, index)])


def block_of(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """matrix[b, rows, columns] of a matrix [b, I, I], as a new [b, r, c]."""
    parts = zip(matrix, rows, columns)
    return torch.stack(
        [own.index_select(0, of_rows).index_select(1, of_columns) for own, of_rows, of_columns in parts]
    )


def squares(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix^T matrix` of matrix [b, n, I], [b, I, I]; on a CPU what is above the diagonal is computed, and copied."""
    size = matrix.shape[2]
    if matrix.device.type != "cpu":
        return matrix.mT @ matrix
    result = matrix.new_empty(len(matrix), size, size)
    for own, of_own in zip(matrix, result):
        for start in range(0, size, PANEL_CPU):
            part, after = slice(start, start + PANEL_CPU), slice(start + PANEL_CPU, None)
            torch.mm(own[:, part].T, own[:, start:], out=of_own[part, start:])
            of_own[after, part] = of_own[part, after].T
    return result


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_gram(gram: torch.Tensor) -> None:
    if gram.numel() and not all(bound.isfinite() for bound in gram.aminmax()):
        raise ValueError(
            "activation_gram has values that are not finite; every value must be. Check the calibration pass for "
            "overflow and repeat it."
        )


def check_kept(kept: torch.Tensor, atoms: int) -> None:
    if kept.dim() != 1 or kept.dtype != torch.int64:
        raise ValueError(
            f"kept has shape {tuple(kept.shape)} and type {kept.dtype}; it must be a one-dimensional torch.int64 "
            "tensor of indices. Turn a mask into indices with mask.nonzero().flatten()."
        )
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < atoms:
        raise ValueError(
            f"kept has indices from {int(kept.min())} to {int(kept.max())}; they must be from 0 to {atoms - 1}. "
            "Check that the plan belongs to this model."
        )
    if len(kept.unique()) != len(kept):
        raise ValueError(
            f"kept has {len(kept)} indices of which {len(kept.unique())} are distinct; all must be. "
            "Remove the repeats."
        )


def check_ridge(ridge: float) -> None:
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge is {ridge}; it must be finite and at least 0. Use 0.01 unless you measured better.")
