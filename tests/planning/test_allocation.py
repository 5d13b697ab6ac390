# Licensed under the Apache License, Version 2.0
"""Allocation against plain loops over numbers, exhaustive search on small cases, ties, bounds and refusals."""

import itertools

import pytest
import torch

from optimum_heapr.configuration import HeaprConfig
from optimum_heapr.planning.allocation import allocate
from optimum_heapr.utils.errors import HeaprError


def random_scores(blocks=3, experts=4, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Layers and experts of different size of scores, so that widths come out different.
    return {
        f"layers.{index}": (0.2 + torch.rand(experts, 1, generator=generator))
        * torch.rand(experts, width, generator=generator)
        for index in range(blocks)
    }


def constant_scores(blocks=2, experts=3, width=4):
    return {f"layers.{index}": torch.ones(experts, width) for index in range(blocks)}


def plan(scores, unreached=None, **options):
    kept = allocate(scores, HeaprConfig(**options), unreached or {})
    return {path: [indices.tolist() for indices in experts] for path, experts in kept.items()}


def widths(kept):
    return {path: [len(indices) for indices in experts] for path, experts in kept.items()}


def count(kept):
    return sum(map(sum, widths(kept).values()))


# References: nothing but loops and sorted()


def groups_of(score, multiple):
    """One expert's atomic experts, best first and lower index first among equals, cut into groups."""
    order = sorted(range(len(score)), key=lambda atom: (-score[atom], atom))
    return [order[start : start + multiple] for start in range(0, len(order), multiple)]


def reference_least(scores, ratio, multiple=1, min_width=0, protected=()):
    """Takes away group after group of least mean importance until the next one would be too much."""
    candidates, kept, total = [], {}, 0
    for block, (path, score) in enumerate(scores.items()):
        kept[path] = [set(range(score.shape[1])) for _ in range(score.shape[0])]
        total += score.numel()
        for expert, row in enumerate(score.double().tolist()):
            for index, group in enumerate(groups_of(row, multiple)):
                if index * multiple < min_width or (path, expert) in protected:
                    continue
                mean = sum(row[atom] for atom in group) / len(group)
                candidates.append((mean, -block, -expert, -index, path, expert, group))
    budget, removed = round(ratio * total), 0
    for *_, path, expert, group in sorted(candidates, key=lambda candidate: candidate[:4]):
        if removed + len(group) > budget:
            break
        removed += len(group)
        kept[path][expert] -= set(group)
    return {path: [sorted(atoms) for atoms in experts] for path, experts in kept.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("multiple", [1, 2, 5, 3])
@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5, 0.93])
def test_global_removes_what_is_worth_least_in_the_whole_model(ratio, multiple, seed):
    scores = random_scores(seed=seed)
    kept = plan(scores, ratio=ratio, width_multiple=multiple)
    assert kept == reference_least(scores, ratio, multiple)
    removed, asked = 120 - count(kept), round(ratio * 120)
    assert asked - multiple < removed <= asked
    if ratio == 0.25 and multiple < 3:
        assert len({width for experts in widths(kept).values() for width in experts}) > 2


@pytest.mark.parametrize("multiple", [1, 2, 3])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
def test_layer_removes_the_same_share_of_each_layer(ratio, multiple):
    scores = random_scores()
    kept = plan(scores, ratio=ratio, allocation="layer", width_multiple=multiple)
    for path, score in scores.items():
        assert kept[path] == reference_least({path: score}, ratio, multiple)[path]
        assert round(ratio * 40) - multiple < 40 - sum(map(len, kept[path])) <= round(ratio * 40)
    assert kept != plan(scores, ratio=ratio, width_multiple=multiple)


@pytest.mark.parametrize(
    ("ratio", "multiple", "width"), [(0.25, 1, 8), (0.5, 1, 5), (0.5, 2, 6), (0.2, 4, 8), (0.4, 3, 6)]
)
def test_uniform_keeps_the_best_of_each_expert(ratio, multiple, width):
    scores = random_scores()
    kept = plan(scores, ratio=ratio, allocation="uniform", width_multiple=multiple)
    for path, score in scores.items():
        for expert, row in enumerate(score.double().tolist()):
            best = sorted(range(10), key=lambda atom: (-row[atom], atom))[:width]
            assert kept[path][expert] == sorted(best)


@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.2, 0.25, 1 / 3, 0.5, 0.65, 0.7, 0.29, 0.57, 0.99])
def test_the_ratio_is_reached_to_the_nearest_atomic_expert(ratio):
    for experts, width in ((4, 25), (3, 7), (2, 50)):
        scores = random_scores(2, experts, width)
        total = 2 * experts * width
        if round(ratio * total):
            assert total - count(plan(scores, ratio=ratio)) == round(ratio * total)


def test_no_choice_of_widths_keeps_more_importance():
    """Every combination of widths that removes the same number, each expert keeping its best."""
    for seed in range(5):
        scores = random_scores(blocks=1, experts=4, width=6, seed=seed)["layers.0"].double()
        ranked = scores.sort(dim=1, descending=True).values
        for multiple, ratio in ((1, 0.25), (2, 0.25), (3, 0.5)):
            kept = plan({"layers.0": scores}, ratio=ratio, width_multiple=multiple)["layers.0"]
            actual = sum(float(scores[expert, atoms].sum()) for expert, atoms in enumerate(kept))
            best = max(
                sum(float(ranked[expert, :width].sum()) for expert, width in enumerate(choice))
                for choice in itertools.product(range(0, 7, multiple), repeat=4)
                if sum(choice) == count({"layers.0": kept})
            )
            assert actual == pytest.approx(best, rel=1e-12)


def test_widths_are_multiples_by_importance_and_not_by_truncation():
    """Rounding plain widths down would take 3 of the first expert, though its third pair is worth most of all that go."""
    scores = {"layers.0": torch.tensor([[9.0, 9, 9, 9, 8, 1], [7, 7, 2, 2, 2, 2]])}
    assert plan(scores, ratio=0.5, width_multiple=2) == {"layers.0": [[0, 1, 2, 3], [0, 1]]}
    scores = {"layers.0": torch.tensor([[9.0, 9, 9, 9, 8, 7], [7, 7, 2, 2, 2, 2]])}
    assert plan(scores, ratio=0.5, width_multiple=2) == {"layers.0": [[0, 1, 2, 3, 4, 5], []]}


@pytest.mark.parametrize("multiple", [2, 3, 4, 8])
def test_a_width_is_a_multiple_or_whole(multiple):
    for allocation in ("global", "layer", "uniform"):
        kept = plan(random_scores(), ratio=0.4, width_multiple=multiple, allocation=allocation)
        for experts in widths(kept).values():
            assert all(width % multiple == 0 or width == 10 for width in experts)


def test_a_whole_expert_may_go():
    scores = {"layers.0": torch.tensor([[1.0, 2, 3], [9, 9, 9]]), "layers.1": torch.full((2, 3), 8.0)}
    assert plan(scores, ratio=0.25) == {"layers.0": [[], [0, 1, 2]], "layers.1": [[0, 1, 2], [0, 1, 2]]}


# Ties


def test_among_equals_the_lower_index_stays():
    """Of equal atomic experts those of the later block, the later expert, the later place go first."""
    kept = plan(constant_scores(), ratio=0.25)  # 6 of 24
    assert kept == {
        "layers.0": [[0, 1, 2, 3]] * 3,
        "layers.1": [[0, 1, 2, 3], [0, 1], []],
    }
    kept = plan(constant_scores(), ratio=0.25, allocation="layer")  # 3 of 12 in each
    assert kept == {"layers.0": [[0, 1, 2, 3], [0, 1, 2, 3], [0]], "layers.1": [[0, 1, 2, 3], [0, 1, 2, 3], [0]]}
    kept = plan(constant_scores(), ratio=0.5, allocation="uniform")
    assert kept == {"layers.0": [[0, 1]] * 3, "layers.1": [[0, 1]] * 3}
    kept = plan(constant_scores(), ratio=0.25, width_multiple=2)
    assert kept == {"layers.0": [[0, 1, 2, 3]] * 3, "layers.1": [[0, 1, 2, 3], [0, 1], []]}


def test_ties_are_broken_the_same_way_among_other_scores():
    generator = torch.Generator().manual_seed(0)
    scores = {f"layers.{i}": torch.randint(0, 4, (5, 12), generator=generator).float() for i in range(3)}
    for ratio in (0.1, 0.3, 0.5, 0.8):
        for multiple in (1, 4):
            assert plan(scores, ratio=ratio, width_multiple=multiple) == reference_least(scores, ratio, multiple)


def test_allocation_is_deterministic_and_leaves_its_input_alone():
    scores = {path: score.round(decimals=1) for path, score in random_scores(experts=8, width=40).items()}
    before = {path: score.clone() for path, score in scores.items()}
    for allocation in ("global", "layer", "uniform"):
        first = plan(scores, ratio=0.3, allocation=allocation)
        assert all(plan(scores, ratio=0.3, allocation=allocation) == first for _ in range(3))
    assert all(torch.equal(scores[path], before[path]) for path in scores)


def test_indices_rise_and_are_int64():
    for experts in allocate(random_scores(), HeaprConfig(ratio=0.5), {}).values():
        for indices in experts:
            assert indices.dtype == torch.int64 and indices.tolist() == sorted(set(indices.tolist()))


def test_negative_scores_are_ranked_too():
    """Unreached experts have them."""
    scores = {"layers.0": torch.tensor([[-0.9, -0.6, -0.7, -0.8], [0.0, 1e-30, 5.0, 1e-20]])}
    assert plan(scores, ratio=0.25) == {"layers.0": [[1, 2], [0, 1, 2, 3]]}
    assert plan(scores, ratio=0.625) == {"layers.0": [[], [1, 2, 3]]}


# What is kept in any case


@pytest.mark.parametrize("allocation", ["global", "layer"])
@pytest.mark.parametrize(("multiple", "min_width"), [(1, 1), (1, 4), (2, 4), (4, 3), (3, 1)])
def test_every_expert_keeps_its_minimum(allocation, multiple, min_width):
    scores = random_scores()
    scores["layers.1"][2] = -1  # would go whole
    kept = plan(scores, ratio=0.5, allocation=allocation, width_multiple=multiple, min_width=min_width)
    assert all(width >= min_width for experts in widths(kept).values() for width in experts)
    assert len(kept["layers.1"][2]) == -(-min_width // multiple) * multiple
    if allocation == "global":
        assert kept == reference_least(scores, 0.5, multiple, min_width)


@pytest.mark.parametrize("allocation", ["global", "layer"])
def test_protected_experts_stay_as_they_are(allocation):
    scores, unreached = random_scores(), {"layers.0": [1, 3], "layers.2": [0]}
    for path, experts in unreached.items():
        scores[path][experts] = -1
    kept = plan(scores, unreached, ratio=0.4, allocation=allocation, protect_unreached=True)
    for path, experts in unreached.items():
        for expert in experts:
            assert kept[path][expert] == list(range(10))
    assert 120 - count(kept) == 48
    protected = {(path, expert) for path, experts in unreached.items() for expert in experts}
    if allocation == "global":
        assert kept == reference_least(scores, 0.4, protected=protected)
    # Without protection they are the first to go: 30 atomic experts, 20 of them in layer 0, where 16 go.
    kept = plan(scores, unreached, ratio=0.4, allocation=allocation)
    left = sum(len(kept[path][expert]) for path, expert in protected)
    assert left == (0 if allocation == "global" else 4)


# What cannot be


def refused(match, scores=None, unreached=None, **options):
    with pytest.raises(HeaprError, match=match) as error:
        plan(scores or random_scores(), unreached, **options)
    assert "\n" not in str(error.value)


def test_a_ratio_beyond_what_is_not_protected_is_refused_naming_what_is_left():
    next_step = "; ask for less or protect less"
    refused(
        r"ratio=0\.9: min_width=4, protect=None and protect_unreached=False leave only 0\.6000 to remove" + next_step,
        ratio=0.9,
        min_width=4,
    )
    assert count(plan(random_scores(), ratio=0.6, min_width=4)) == 48
    refused(
        r"ratio=0\.8: min_width=0, protect=None and protect_unreached=True leave only 0\.7500 to remove" + next_step,
        ratio=0.8,
        protect_unreached=True,
        unreached={f"layers.{layer}": [2] for layer in range(3)},
    )
    refused(
        r"ratio=0\.8: .* leave only 0\.7500 to remove",
        ratio=0.8,
        allocation="layer",
        protect_unreached=True,
        unreached={"layers.1": [2]},
    )


def test_a_ratio_that_removes_nothing_is_refused():
    refused(
        r"ratio=0\.01: removes less than one group of width_multiple=5 atomic experts; raise ratio or lower",
        ratio=0.01,
        width_multiple=5,
    )
    refused(r"ratio=0\.001: removes less than one group", ratio=0.001)


def test_impossible_uniform_widths_are_refused_naming_what_is_possible():
    refused(
        r"ratio=0\.01: no multiple of 1 below the width 10 fits; the smallest possible ratio is 0\.1000",
        ratio=0.01,
        allocation="uniform",
    )
    refused(
        r"ratio=0\.1: no multiple of 4 below the width 10 fits; the smallest possible ratio is 0\.2000",
        ratio=0.1,
        allocation="uniform",
        width_multiple=4,
    )
    refused(
        r"ratio=0\.5: no multiple of 10 below the width 10 fits; lower width_multiple",
        ratio=0.5,
        allocation="uniform",
        width_multiple=10,
    )
    refused(
        r"ratio=0\.99: leaves fewer than 1 of 10 atomic experts; the largest ratio is 0\.9000",
        ratio=0.99,
        allocation="uniform",
    )
    refused(r"min_width=6: ratio=0\.5 leaves width 5; lower one", ratio=0.5, allocation="uniform", min_width=6)
    refused(
        "protect_unreached=True: allocation='uniform' gives every expert the same width; use global or layer",
        ratio=0.5,
        allocation="uniform",
        protect_unreached=True,
    )


@pytest.mark.parametrize("smallest", [0.1, 0.2])
def test_the_ratio_that_a_refusal_names_is_possible(smallest):
    multiple = {0.1: 1, 0.2: 4}[smallest]
    kept = plan(random_scores(), ratio=smallest, allocation="uniform", width_multiple=multiple)
    assert count(kept) == round(120 * (1 - smallest))


@pytest.mark.parametrize("name", ["width_multiple", "min_width"])
@pytest.mark.parametrize("allocation", ["global", "layer", "uniform"])
def test_bounds_beyond_the_width_are_refused(name, allocation):
    refused(rf"{name}=11: must be at most 10, the width of an expert", ratio=0.5, allocation=allocation, **{name: 11})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused(value):
    scores = random_scores()
    scores["layers.1"][2, 3] = value
    refused(r"scores of layers\.1: not finite; calibrate again", scores, ratio=0.5)


def test_blocks_may_differ_in_size():
    scores = {"wide": torch.rand(2, 12), "narrow": torch.rand(5, 3)}
    for multiple in (1, 3):
        assert plan(scores, ratio=0.4, width_multiple=multiple) == reference_least(scores, 0.4, multiple)
