# Licensed under the Apache License, Version 2.0
"""Greedy elimination against brute force.

The quadratic is the product form 1/2 * trace(T A T^T M) of the loss increase when the columns of `down_proj` change
from W to W + W T. Brute force builds T explicitly for a whole set of removed atoms, solves for the compensation from
scratch, and evaluates the trace; it shares neither the inverse nor the updates with the code under test.
"""

import itertools

import pytest
import torch

from optimum_heapr.criteria import elimination
from optimum_heapr.criteria.elimination import greedy_elimination


def samples(atoms, tokens=64, hidden=5, seed=0):
    """Correlated activations r * h [tokens, I], output gradients g [tokens, H] and down_proj W [H, I], in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(tokens, atoms) @ normal(atoms, atoms), normal(tokens, hidden), normal(hidden, atoms)


def grams(*args, **kwargs):
    activations, gradients, weight = samples(*args, **kwargs)
    atom_gradients = gradients @ weight
    return activations.T @ activations / len(activations), atom_gradients.T @ atom_gradients / len(gradients)


def batch(experts, atoms, **kwargs):
    pairs = [grams(atoms, seed=seed, **kwargs) for seed in range(experts)]
    return torch.stack([a for a, _ in pairs]), torch.stack([m for _, m in pairs])


def ridged(gram, ridge):
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def change(gram, removed):
    """T [I, I] of removing a set with optimal compensation: minus one for what goes, the regression for what stays."""
    kept = [k for k in range(len(gram)) if k not in removed]
    matrix = torch.zeros_like(gram)
    for atom in removed:
        matrix[atom, atom] = -1
        if kept:
            matrix[atom, kept] = torch.linalg.lstsq(gram[kept][:, kept], gram[kept, atom][:, None]).solution[:, 0]
    return matrix


def loss_increase(matrix, gram, gradient_gram):
    return 0.5 * torch.trace(matrix @ gram @ matrix.T @ gradient_gram)


def removal_loss(removed, gram, gradient_gram):
    return loss_increase(change(gram, removed), gram, gradient_gram)


def dense_reference(gram, gradient_gram):
    """One atom at a time with the full matrices of the module's formulas."""
    inverse, atoms = torch.linalg.inv(gram), len(gram)
    left, order, cost = list(range(atoms)), [], []
    for _ in range(atoms):
        values = torch.stack([0.5 * gradient_gram[k, k] / inverse[k, k] for k in left])
        k = left[int(values.argmin())]
        order.append(k)
        cost.append(values.min())
        direction = inverse[k] / inverse[k, k]
        unit = torch.eye(atoms, dtype=gram.dtype)[k]
        project = torch.eye(atoms, dtype=gram.dtype) - torch.outer(direction, unit)
        gradient_gram = project @ gradient_gram @ project.T
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        left.remove(k)
    return torch.tensor(order), torch.stack(cost)


def test_the_product_form_is_the_loss_over_all_pairs_of_tokens():
    activations, gradients, weight = samples(4)
    gram, gradient_gram = grams(4)
    matrix = change(gram, [1, 3])
    pairs = gradients @ weight @ matrix @ activations.T  # first-order change of the loss, gradient of s, token t
    torch.testing.assert_close(loss_increase(matrix, gram, gradient_gram), 0.5 * pairs.pow(2).mean())


def test_no_other_compensation_costs_less():
    gram, gradient_gram = grams(5)
    best = change(gram, [0, 2])
    for seed in range(20):
        other = best.clone()
        other[[0, 0, 2], [1, 3, 4]] += 0.1 * torch.randn(3, generator=torch.Generator().manual_seed(seed)).double()
        assert loss_increase(other, gram, gradient_gram) >= loss_increase(best, gram, gradient_gram)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_is_the_cheapest_single_removal(seed, ridge):
    gram, gradient_gram = grams(6, seed=seed)
    result = greedy_elimination(gram[None], gradient_gram[None], ridge, dtype=torch.float64)
    gram = ridged(gram, ridge)
    removed, spent = [], torch.zeros((), dtype=torch.float64)
    for chosen, cost in zip(result.order[0].tolist(), result.cost[0]):
        totals = {k: removal_loss([*removed, k], gram, gradient_gram) for k in range(6) if k not in removed}
        assert chosen == min(totals, key=totals.get)
        torch.testing.assert_close(cost, totals[chosen] - spent)
        # and the same from the weights as they are now: W + W T, of which one more column goes
        now = torch.eye(6, dtype=torch.float64) + change(gram, removed)
        left = [k for k in range(6) if k not in removed]
        current = (now.T @ gradient_gram @ now)[left][:, left]
        torch.testing.assert_close(cost, removal_loss([left.index(chosen)], gram[left][:, left], current))
        removed.append(chosen)
        spent = totals[chosen]
    torch.testing.assert_close(result.cost.sum(), 0.5 * (gram * gradient_gram).sum())  # everything is gone


def test_uncorrelated_atoms_go_in_the_best_order_of_all_subsets():
    generator = torch.Generator().manual_seed(0)
    gram = torch.diag(torch.rand(6, generator=generator, dtype=torch.float64) + 0.1)
    _, gradient_gram = grams(6)
    result = greedy_elimination(gram[None], gradient_gram[None], 0.0, dtype=torch.float64)
    for count in range(1, 7):
        subsets = list(itertools.combinations(range(6), count))
        losses = torch.stack([removal_loss(list(subset), gram, gradient_gram) for subset in subsets])
        assert set(subsets[int(losses.argmin())]) == set(result.order[0, :count].tolist())
        torch.testing.assert_close(result.cost[0, :count].sum(), losses.min())


@pytest.mark.parametrize("steps", [1, 5, 23, 64])
def test_delayed_updates_are_exact(monkeypatch, steps):
    monkeypatch.setattr(elimination, "STEPS_PER_BLOCK", steps)
    gram, gradient_gram = batch(2, 24)
    result = greedy_elimination(gram, gradient_gram, 0.01, dtype=torch.float64)
    for expert in range(2):
        order, cost = dense_reference(ridged(gram[expert], 0.01), gradient_gram[expert])
        assert torch.equal(result.order[expert], order)
        torch.testing.assert_close(result.cost[expert], cost)


def test_a_batch_equals_one_expert_at_a_time():
    gram, gradient_gram = batch(5, 12)
    together = greedy_elimination(gram, gradient_gram, dtype=torch.float64)
    in_chunks = greedy_elimination(gram, gradient_gram, dtype=torch.float64, experts_at_once=2)
    for expert in range(5):
        alone = greedy_elimination(gram[expert : expert + 1], gradient_gram[expert : expert + 1], dtype=torch.float64)
        for result in (together, in_chunks):
            assert torch.equal(result.order[expert], alone.order[0])
            torch.testing.assert_close(result.cost[expert], alone.cost[0])


def test_ridge_per_expert():
    gram, gradient_gram = batch(2, 8)
    both = greedy_elimination(gram, gradient_gram, torch.tensor([0.01, 2.0]), dtype=torch.float64)
    for expert, ridge in enumerate((0.01, 2.0)):
        alone = greedy_elimination(gram[[expert]], gradient_gram[[expert]], ridge, dtype=torch.float64)
        assert torch.equal(both.order[expert], alone.order[0])
        torch.testing.assert_close(both.cost[expert], alone.cost[0], rtol=1e-6, atol=0)


def test_inputs_are_left_alone_and_every_atom_is_removed_once():
    gram, gradient_gram = batch(3, 10)
    before = gram.clone(), gradient_gram.clone()
    result = greedy_elimination(gram, gradient_gram)
    assert torch.equal(gram, before[0]) and torch.equal(gradient_gram, before[1])
    assert torch.equal(result.order.sort(dim=1).values, torch.arange(10).expand(3, -1))
    assert result.order.dtype == torch.int64 and result.cost.dtype == torch.float32


def test_monotone_cost_is_the_running_maximum():
    gram, gradient_gram = batch(8, 16)
    result = greedy_elimination(gram, gradient_gram)
    assert (result.cost.diff(dim=1) < 0).any()  # otherwise this shows nothing
    assert (result.monotone_cost.diff(dim=1) >= 0).all() and (result.monotone_cost >= result.cost).all()
    for step in range(16):
        assert torch.equal(result.monotone_cost[:, step], result.cost[:, : step + 1].max(dim=1).values)


def test_ties_go_to_the_lowest_index():
    identity = torch.eye(70)[None]  # longer than one block
    assert greedy_elimination(identity, identity).order[0].tolist() == list(range(70))
    gradient_gram = torch.diag(torch.tensor([2.0, 1.0, 2.0, 1.0]))[None]
    assert greedy_elimination(torch.eye(4)[None], gradient_gram).order[0].tolist() == [1, 3, 0, 2]


def test_unreached_experts_are_in_order_and_free():
    gram, gradient_gram = batch(3, 6)
    gram[1] = 0
    result = greedy_elimination(gram, gradient_gram, dtype=torch.float64)
    assert result.order[1].tolist() == list(range(6)) and (result.cost[1] == 0).all()
    others = greedy_elimination(gram[[0, 2]], gradient_gram[[0, 2]], dtype=torch.float64)
    assert torch.equal(result.order[[0, 2]], others.order)
    nobody = greedy_elimination(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3), 0.0)
    assert nobody.order.tolist() == [[0, 1, 2]] * 2 and not nobody.cost.any()


def test_an_atom_that_never_fires_goes_first():
    gram, gradient_gram = grams(6)
    gram[4], gram[:, 4] = 0, 0
    result = greedy_elimination(gram[None], gradient_gram[None], 1e-6, dtype=torch.float64)
    assert result.order[0, 0] == 4 and result.cost[0, 0] < 1e-5 * result.cost[0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_of_two_identical_atoms_is_almost_free(dtype):
    activations, gradients, weight = samples(6)
    activations[:, 5] = activations[:, 2]
    atom_gradients = gradients @ weight
    gram, gradient_gram = activations.T @ activations / 64, atom_gradients.T @ atom_gradients / 64
    for ridge in (1e-4, 0.0):  # without ridge A is singular, and the least ridge that works is found
        result = greedy_elimination(gram[None], gradient_gram[None], ridge, dtype=dtype)
        first, *others = result.order[0].tolist()
        twin = result.cost[0, 1 + others.index({2: 5, 5: 2}[first])]
        assert result.cost[0, 0] < 1e-2 * result.cost[0, 1:].min()
        assert twin > 100 * result.cost[0, 0]  # it does the work of both now


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_fewer_tokens_than_atoms_stay_finite(ridge):
    gram, gradient_gram = batch(2, 40, tokens=7)
    result = greedy_elimination(gram, gradient_gram, ridge)
    assert result.cost.isfinite().all() and (result.cost >= 0).all()
    assert torch.equal(result.order.sort(dim=1).values, torch.arange(40).expand(2, -1))


def test_float32_reports_the_true_cost_of_its_order():
    gram, gradient_gram = grams(48, tokens=400, hidden=16)
    result = greedy_elimination(gram[None].float(), gradient_gram[None].float())
    gram = ridged(gram, 0.01)
    for count in (8, 24, 40, 48):
        truth = removal_loss(result.order[0, :count].tolist(), gram, gradient_gram)
        torch.testing.assert_close(result.cost[0, :count].double().sum(), truth, rtol=1e-4, atol=0)


def test_the_scale_of_the_statistics_does_not_matter():
    gram, gradient_gram = batch(2, 12)
    plain = greedy_elimination(gram, gradient_gram, dtype=torch.float64)
    scaled = greedy_elimination((gram * 1e12).float(), (gradient_gram * 1e-25).float())
    assert torch.equal(plain.order, scaled.order)
    torch.testing.assert_close(scaled.cost.double(), plain.cost * 1e-13, rtol=1e-4, atol=0)


def test_no_experts_or_no_atoms():
    assert greedy_elimination(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4)).order.shape == (0, 4)
    assert greedy_elimination(torch.zeros(2, 0, 0), torch.zeros(2, 0, 0)).cost.shape == (2, 0)


@pytest.mark.parametrize(
    ("gram", "gradient_gram", "options", "message"),
    [
        (torch.eye(3), torch.eye(3), {}, r"shape \(3, 3\).*activation_gram\[None\]"),
        (torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), {}, r"shape \(1, 3, 2\)"),
        (torch.eye(3)[None], torch.eye(4)[None], {}, r"gradient_gram has shape \(1, 4, 4\).*\(1, 3, 3\)"),
        (torch.full((1, 2, 2), torch.nan), torch.eye(2)[None], {}, "activation_gram has values that are not finite"),
        (torch.eye(2)[None], torch.full((1, 2, 2), torch.inf), {}, "gradient_gram has values that are not finite"),
        (-torch.eye(2)[None], torch.eye(2)[None], {}, "activation_gram has -1 on its diagonal"),
        (torch.ones(1, 3, 3) * 9 - torch.eye(3) * 8, torch.eye(3)[None], {"ridge": -0.1}, "ridge is -0.1"),
        (torch.eye(2)[None], torch.eye(2)[None], {"ridge": float("nan")}, "ridge is nan"),
        (torch.eye(2)[None], torch.eye(2)[None], {"ridge": torch.ones(3)}, r"ridge has shape \(3,\)"),
        (torch.eye(2)[None], torch.eye(2)[None], {"dtype": torch.float16}, "dtype is torch.float16"),
        (torch.eye(2)[None], torch.eye(2)[None], {"experts_at_once": 0}, "experts_at_once is 0"),
        (torch.tensor([[[1.0, 90.0], [90.0, 1.0]]]), torch.eye(2)[None], {}, "not positive semidefinite"),
    ],
)
def test_bad_arguments_are_refused(gram, gradient_gram, options, message):
    with pytest.raises(ValueError, match=message):
        greedy_elimination(gram, gradient_gram, **options)
