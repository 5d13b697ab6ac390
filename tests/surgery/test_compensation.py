# Licensed under the Apache License, Version 2.0
"""Compensation against least squares on explicit activations."""

import pytest
import torch

from optimum_heapr.surgery.compensation import compensate, compensate_experts, ridge_for_tokens
from optimum_heapr.surgery.regression import compensation_weights


PLENTY = 10**9  # tokens: so many that the ridge asked for is the ridge used


def expert(hidden=5, atoms=8, tokens=200, seed=0, dtype=torch.float64):
    """down_proj [H, I], correlated activations [tokens, I] and their Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(hidden, atoms, generator=generator, dtype=dtype)
    mixing = torch.randn(atoms, atoms, generator=generator, dtype=dtype)
    activations = torch.randn(tokens, atoms, generator=generator, dtype=dtype) @ mixing
    return weight, activations, activations.T @ activations / tokens


def complement(kept, atoms):
    return [k for k in range(atoms) if k not in kept.tolist()]


def relative_error(weight, new, kept, activations):
    output = activations @ weight.T
    return ((output - activations[:, kept] @ new.T).pow(2).sum() / output.pow(2).sum()).item()


@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.3])
def test_equals_least_squares_on_the_activations(ridge):
    weight, activations, gram = expert()
    kept = torch.tensor([1, 2, 4, 7])
    removed = complement(kept, 8)
    result = compensate(weight, gram, kept, PLENTY, ridge)
    # The ridge as extra rows: one for each kept atom, that pulls the change of its column to zero.
    strength = (len(activations) * ridge * gram.diagonal().mean()).sqrt()
    inputs = torch.cat([activations[:, kept], strength * torch.eye(4, dtype=torch.float64)])
    targets = torch.cat([activations[:, removed] @ weight[:, removed].T, torch.zeros(4, 5, dtype=torch.float64)])
    change = torch.linalg.lstsq(inputs, targets).solution.T
    torch.testing.assert_close(result.down_proj, weight[:, kept] + change, rtol=1e-5, atol=1e-6)
    assert result.error_after == pytest.approx(relative_error(weight, result.down_proj, kept, activations))
    assert result.error_before == pytest.approx(relative_error(weight, weight[:, kept], kept, activations))
    assert result.error_after < result.error_before
    assert result.ridge == pytest.approx(max(ridge, 8 / PLENTY))


def test_weights_solve_the_normal_equations():
    _, _, gram = expert()
    kept = torch.tensor([0, 3, 5])
    removed = complement(kept, 8)
    weights = compensation_weights(gram, kept, 0.1)
    regularized = gram[kept][:, kept] + 0.1 * gram.diagonal().mean() * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(weights @ regularized, gram[removed][:, kept], rtol=1e-6, atol=1e-6)


def test_weights_of_a_batch():
    grams = torch.stack([expert(seed=seed)[2] for seed in range(3)])
    kept = torch.tensor([[0, 1, 2], [5, 3, 7], [2, 4, 6]])
    together = compensation_weights(grams, kept, torch.tensor([0.01, 0.1, 1.0]))
    assert together.shape == (3, 5, 3)
    for index, ridge in enumerate((0.01, 0.1, 1.0)):
        torch.testing.assert_close(
            together[index], compensation_weights(grams[index], kept[index], ridge), rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_removed_changes_nothing(dtype):
    weight, _, gram = expert()
    weight = weight.to(dtype)
    weight[0, 0] = -0.0
    result = compensate(weight, gram, torch.arange(8), 200)
    assert result.down_proj.dtype == dtype
    assert torch.equal(result.down_proj, weight) and torch.signbit(result.down_proj[0, 0])
    assert (result.error_before, result.error_after, result.ridge) == (0.0, 0.0, None)
    assert result.down_proj.data_ptr() != weight.data_ptr()


def test_everything_removed():
    weight, _, gram = expert()
    result = compensate(weight, gram, torch.empty(0, dtype=torch.int64), 200)
    assert result.down_proj.shape == (5, 0)
    assert result.error_before == result.error_after == pytest.approx(1.0)


def test_columns_follow_the_order_of_kept():
    weight, _, gram = expert()
    sorted_result = compensate(weight, gram, torch.tensor([1, 4, 6]), 200)
    result = compensate(weight, gram, torch.tensor([6, 1, 4]), 200)
    torch.testing.assert_close(result.down_proj, sorted_result.down_proj[:, [2, 0, 1]])


def test_a_duplicate_is_made_up_for():
    weight, activations, _ = expert()
    activations[:, 7] = activations[:, 2]
    gram = activations.T @ activations / len(activations)
    result = compensate(weight, gram, torch.arange(7), PLENTY, 1e-9)
    assert result.error_before > 1e-3 and result.error_after < 1e-10
    torch.testing.assert_close(result.down_proj[:, 2], weight[:, 2] + weight[:, 7], rtol=1e-4, atol=1e-4)


def test_uncorrelated_atoms_have_nothing_to_compensate_with():
    weight, _, _ = expert()
    result = compensate(weight, torch.eye(8, dtype=torch.float64), torch.tensor([0, 1]), 200)
    assert torch.equal(result.down_proj, weight[:, :2]) and result.error_after == result.error_before


def test_the_error_is_that_of_the_stored_type():
    weight, activations, gram = expert()
    weight = weight.bfloat16()
    kept = torch.tensor([0, 1, 2, 3, 4, 5])
    result = compensate(weight, gram, kept, 200)
    assert result.down_proj.dtype == torch.bfloat16
    measured = relative_error(weight.double(), result.down_proj.double(), kept, activations)
    assert result.error_after == pytest.approx(measured, rel=1e-4)


def test_worse_than_plain_removal_is_not_used():
    # A change so small that the type of the weights cannot hold it: what is left of it does not lower the error.
    weight = torch.tensor([[1.0, 1.0, 1e-3]], dtype=torch.bfloat16)
    gram = torch.tensor([[1.0, 0.0, 0.05], [0.0, 1.0, 0.0], [0.05, 0.0, 1.0]])
    result = compensate(weight, gram, torch.tensor([0, 1]), PLENTY)
    assert torch.equal(result.down_proj, weight[:, :2]) and result.error_after == result.error_before


@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize("tokens", [0, 1, 3, 8, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_worse_than_plain_removal_and_never_noise(tokens, ridge, dtype):
    weight, activations, _ = expert(atoms=16, dtype=torch.float32)
    activations = activations[:tokens]
    gram = activations.T @ activations / max(tokens, 1)
    kept = torch.arange(0, 16, 2)
    result = compensate(weight.to(dtype), gram, kept, tokens, ridge)
    assert result.down_proj.isfinite().all() and result.error_after <= result.error_before
    assert result.down_proj.float().norm() < 3 * weight.norm()
    if tokens == 0:
        assert torch.equal(result.down_proj, weight.to(dtype)[:, kept]) and result.ridge is None


def test_a_gram_matrix_that_cannot_be_factored_means_plain_removal():
    weight = torch.ones(1, 3)
    gram = torch.tensor([[1.0, 50.0, 0.0], [50.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # not positive semidefinite
    result = compensate(weight, gram, torch.tensor([0, 1]), PLENTY)
    assert torch.equal(result.down_proj, weight[:, :2]) and result.ridge is None
    with pytest.raises(ValueError, match="Use a larger ridge"):
        compensation_weights(gram, torch.tensor([0, 1]), 0.01)


def test_float64_takes_over_where_float32_cannot_factor():
    # Integers, so exact in float32; the determinant over the kept atoms is 1, far below what float32 resolves. Whether
    # a factorization notices depends on how its rounding falls, so those where it does are looked for.
    found = 0
    for n in range(300, 600, 7):
        activations = torch.tensor([[n, n + 1, 3.0], [n - 1, n, 2.0]])  # atom 2 = (n - 2) * atom 0 + (3 - n) * atom 1
        gram = activations.T @ activations
        if torch.linalg.cholesky_ex(gram[:2, :2]).info == 0:
            continue
        found += 1
        weights = compensation_weights(gram, torch.tensor([0, 1]), 0.0)
        torch.testing.assert_close(weights, torch.tensor([[n - 2.0, 3.0 - n]]), rtol=1e-2, atol=0)
    assert found


def test_the_ridge_grows_as_tokens_get_fewer():
    assert ridge_for_tokens(0.01, 96, 10**6) == 0.01
    assert ridge_for_tokens(0.01, 96, 960) == pytest.approx(0.1)
    assert ridge_for_tokens(0.01, 96, 48) == 2.0
    assert ridge_for_tokens(0.01, 96, 0) == 96.0


def test_few_tokens_do_not_hurt_on_tokens_that_were_not_seen():
    atoms, kept = 32, torch.arange(0, 32, 2)
    weight, activations, _ = expert(hidden=16, atoms=atoms, tokens=1000, seed=3)
    activations = activations + 2 * activations[:, :1].sign()  # a shared direction, so that there is something to win
    seen, unseen = activations[:20], activations[20:]
    gram = seen.T @ seen / 20
    plain = relative_error(weight, weight[:, kept], kept, unseen)
    small_ridge = weight[:, kept] + weight[:, 1::2] @ compensation_weights(gram, kept, 0.01)
    result = compensate(weight, gram, kept, 20, 0.01)
    assert relative_error(weight, small_ridge, kept, unseen) > plain  # what the rule is for
    assert relative_error(weight, result.down_proj, kept, unseen) < plain


def test_many_experts_equal_one_at_a_time():
    experts = [expert(seed=seed, dtype=torch.float32) for seed in range(7)]
    kept = [torch.tensor(k) for k in ([0, 1, 2], [3, 4], [5, 6, 7], list(range(8)), [2, 0], [7, 1, 3], [1, 2, 4])]
    tokens = [200, 5, 0, 200, 50, 200, 200]
    results = compensate_experts([e[0] for e in experts], [e[2] for e in experts], kept, tokens)
    for (weight, _, gram), selected, count, result in zip(experts, kept, tokens, results):
        alone = compensate(weight, gram, selected, count)
        torch.testing.assert_close(result.down_proj, alone.down_proj)
        assert result.error_before == pytest.approx(alone.error_before, rel=1e-5, abs=1e-9)
        assert result.error_after == pytest.approx(alone.error_after, rel=1e-5, abs=1e-9)
        assert result.ridge == alone.ridge
    stacked = compensate_experts(
        torch.stack([e[0] for e in experts]), torch.stack([e[2] for e in experts]), kept, torch.tensor(tokens)
    )
    assert all(torch.equal(a.down_proj, b.down_proj) for a, b in zip(stacked, results))
    assert compensate_experts([], [], [], []) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"down_proj": torch.ones(8)}, r"down_proj has shape \(8,\)"),
        ({"activation_gram": torch.eye(7)}, r"activation_gram has shape \(7, 7\).*\(8, 8\)"),
        ({"kept": torch.tensor([0, 8])}, "from 0 to 8; they must be from 0 to 7"),
        ({"kept": torch.tensor([-1, 2])}, "from -1 to 2"),
        ({"kept": torch.tensor([1, 1])}, "1 are distinct"),
        ({"kept": torch.ones(8, dtype=torch.bool)}, "torch.bool.*mask.nonzero"),
        ({"token_count": -1}, "token_count is -1"),
        ({"ridge": -0.5}, "ridge is -0.5"),
        ({"activation_gram": torch.full((8, 8), torch.nan)}, "activation_gram has values that are not finite"),
        ({"down_proj": torch.full((5, 8), torch.inf)}, "down_proj has values that are not finite"),
    ],
)
def test_bad_arguments_are_refused(changed, message):
    arguments = {"down_proj": torch.ones(5, 8), "activation_gram": torch.eye(8), "kept": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        compensate(**{**arguments, "token_count": 10, "ridge": 0.01, **changed})


def test_lists_of_different_length_and_bad_batches_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 0, 1, 1\] entries"):
        compensate_experts([torch.ones(2, 2)], [], [torch.tensor([0])], [1])
    with pytest.raises(ValueError, match=r"activation_gram has shape \(2, 3, 3\) and kept \(2,\)"):
        compensation_weights(torch.eye(3).expand(2, 3, 3), torch.tensor([0, 1]))
