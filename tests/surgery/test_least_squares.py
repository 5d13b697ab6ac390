# Licensed under the Apache License, Version 2.0
"""The fit over several experts against the normal equations that it never makes."""

import pytest
import torch

from optimum_heapr.surgery import least_squares
from optimum_heapr.surgery.least_squares import Part, solve_together


TOKENS, HIDDEN = 60, 7


def problem(shares_tokens: bool = True, dtype: torch.dtype = torch.float64) -> tuple[list[Part], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for number, width in enumerate((5, 1, 8)):
        chosen = torch.rand(TOKENS, generator=generator) < 0.6 if shares_tokens else torch.arange(TOKENS) % 3 == number
        tokens = chosen.nonzero().flatten()
        activations = torch.randn(len(tokens), width, generator=generator, dtype=torch.float64)
        mixed = activations @ torch.randn(width, width, generator=generator, dtype=torch.float64)
        parts.append(Part(tokens, mixed.to(dtype), 0.3 * (number + 1)))
    return parts, torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def solve(parts: list[Part], target: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    """The changes, and what they leave of the squared target."""
    gradient = target.new_zeros(sum(part.activations.shape[1] for part in parts), HIDDEN)
    for part, own in zip(parts, gradient.split([part.activations.shape[1] for part in parts])):
        part.add_correlation(target, own)
    changes, lowered = solve_together(parts, len(target), gradient)
    return changes, float(target.square().sum()) - lowered


def by_normal_equations(parts: list[Part], target: torch.Tensor) -> torch.Tensor:
    """[all widths, d], from the matrix of all pairs."""
    design = target.new_zeros(len(target), sum(part.activations.shape[1] for part in parts))
    ridge, start = [], 0
    for part in parts:
        width = part.activations.shape[1]
        design[part.tokens, start : start + width] = part.activations.to(target.dtype)
        ridge += [part.ridge] * width
        start += width
    matrix = design.T @ design + torch.tensor(ridge, dtype=target.dtype).diag()
    return torch.linalg.solve(matrix, design.T @ target)


@pytest.mark.parametrize("columns_at_once", [HIDDEN, 3, 0])
@pytest.mark.parametrize("tokens_at_once", [TOKENS, 7])
def test_equals_the_normal_equations(monkeypatch, tokens_at_once, columns_at_once):
    monkeypatch.setattr(least_squares, "TOLERANCE", 1e-10)
    monkeypatch.setattr(least_squares, "NUMBERS_AT_ONCE", tokens_at_once * HIDDEN)
    monkeypatch.setattr(least_squares, "UNKNOWNS_AT_ONCE", columns_at_once * 14 or 5)  # 5 are less than a column has
    parts, target = problem()
    changes, left = solve(parts, target)
    assert [change.shape for change in changes] == [(5, HIDDEN), (1, HIDDEN), (8, HIDDEN)]
    torch.testing.assert_close(torch.cat(changes), by_normal_equations(parts, target), rtol=1e-8, atol=1e-8)
    made = torch.zeros_like(target)
    for part, change in zip(parts, changes):
        part.add_output(change, made)
    assert left == pytest.approx(float((target - made).square().sum()), rel=1e-8)


def test_the_tolerance_in_use_is_near_enough():
    parts, target = problem(dtype=torch.float32)
    changes, left = solve(parts, target)
    exact = by_normal_equations(parts, target.double())
    assert (torch.cat(changes) - exact).norm() < 0.03 * exact.norm()
    made = torch.zeros_like(target)
    for part, change in zip(parts, changes):
        part.add_output(change, made)
    assert changes[0].dtype == torch.float32 and left < target.square().sum()
    assert left == pytest.approx(float((target - made).square().sum()), rel=1e-5)


def test_experts_that_share_no_tokens_are_solved_in_one_step(monkeypatch):
    monkeypatch.setattr(least_squares, "MOST_STEPS", 1)
    parts, target = problem(shares_tokens=False)
    changes, _ = solve(parts, target)
    torch.testing.assert_close(torch.cat(changes), by_normal_equations(parts, target), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("columns", [slice(0, HIDDEN), slice(0, 3)])
def test_nothing_to_make_up_for_changes_nothing(columns):
    parts, target = problem()
    target[:, columns] = 0
    changes, _ = solve(parts, target)
    assert (torch.cat(changes)[:, columns] == 0).all()
    assert torch.cat(changes).isfinite().all()
