# Licensed under the Apache License, Version 2.0
"""Every criterion against its formula, one number at a time, and the rank of experts that were never measured."""

import math

import pytest
import torch

from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.calibration.statistics import AtomicStatistics, BlockStatistics
from optimum_heapr.configuration import CRITERIA as NAMES
from optimum_heapr.configuration import REDUCED, HeaprConfig
from optimum_heapr.criteria import CRITERIA, importance
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.utils.errors import HeaprError
from tests.helpers import calibration_data, random_statistics, tiny_model


MEASURED = ["heapr", "fisher", "activation"]


def test_the_registry_is_the_list_of_the_configuration():
    assert tuple(CRITERIA) == NAMES
    assert tuple(name for name, criterion in CRITERIA.items() if criterion.has_reduction) == REDUCED
    for name, criterion in CRITERIA.items():
        assert criterion.name == name and criterion.__doc__
    assert [name for name, criterion in CRITERIA.items() if criterion.needs_tokens] == [
        "heapr",
        "fisher",
        "obs",
        "activation",
    ]


def by_hand(name, h2, g2, hg2, norm, n):
    return {
        "heapr": 0.5 * (h2 / n) * (g2 / n),
        "fisher": 0.5 * hg2 / n,
        "activation": h2 / n,
        "magnitude": norm,
    }[name]


@pytest.mark.parametrize("name", ["heapr", "fisher", "activation", "magnitude"])
def test_scores_follow_the_formula(name):
    statistics = random_statistics(blocks=3, experts=3, width=5, dtype=torch.float64)
    scores = importance(statistics, name)
    assert list(scores) == list(statistics.blocks)
    assert torch.equal(
        importance(statistics, name)["model.layers.0.mlp.experts"], scores["model.layers.0.mlp.experts"]
    )
    for path, block in statistics.blocks.items():
        assert scores[path].shape == (3, 5)
        for expert in range(3):
            for atom in range(5):
                values = (
                    part[expert, atom].item()
                    for part in (block.activation_sq_sum, block.gradient_sq_sum, block.fisher_sum, block.weight_norm)
                )
                expected = by_hand(name, *values, block.token_count[expert].item())
                assert math.isclose(scores[path][expert, atom].item(), expected, rel_tol=1e-12)


def test_heapr_is_the_default():
    statistics = random_statistics()
    for path, scores in importance(statistics).items():
        assert torch.equal(scores, importance(statistics, "heapr")[path])


def test_an_unknown_criterion_is_refused_with_the_nearest_name():
    with pytest.raises(HeaprError) as error:
        importance(random_statistics(), "magnitud")
    assert str(error.value) == (
        f"criterion='magnitud': must be one of {', '.join(NAMES)}; did you mean \"magnitude\"?"
    )


def test_the_norm_is_that_of_the_three_rows_of_an_atomic_expert():
    for model_type in ("qwen3_moe", "gpt_oss"):
        model = tiny_model(model_type)
        block = find_expert_blocks(model)[1]
        scores = importance(calibrate(model, calibration_data(4)), "magnitude")[block.path]
        module = block.module
        for expert, atom in ((0, 0), (3, 7), (5, 11)):
            if model_type == "gpt_oss":
                gate, up = module.gate_up_proj[expert][:, 2 * atom], module.gate_up_proj[expert][:, 2 * atom + 1]
                down = module.down_proj[expert][atom]
            else:
                gate, up = module.gate_up_proj[expert][atom], module.gate_up_proj[expert][12 + atom]
                down = module.down_proj[expert][:, atom]
            torch.testing.assert_close(scores[expert, atom], torch.cat([gate, up, down]).norm(), rtol=1e-6, atol=0)


# Random


def test_random_scores_depend_on_the_seed_and_the_block_alone():
    statistics, other = random_statistics(blocks=3), random_statistics(blocks=2, seed=5)
    first, again = importance(statistics, "random", 3), importance(statistics, "random", 3)
    for path, scores in first.items():
        assert torch.equal(scores, again[path])
        assert not torch.equal(scores, importance(statistics, "random", 4)[path])
        assert ((scores >= 0) & (scores < 1)).all() and len(scores.unique()) > 20
    # Other statistics, another number of blocks: the numbers of a block stay.
    for path in other.blocks:
        assert torch.equal(importance(other, "random", 3)[path], first[path])
    zero, one, two = first.values()
    assert not torch.equal(zero, one) and not torch.equal(one, two)


def test_random_scores_do_not_touch_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    importance(random_statistics(), "random")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
def test_any_seed_that_a_configuration_takes_will_do(seed):
    scores = importance(random_statistics(), "random", HeaprConfig(seed=seed).seed)
    assert not torch.equal(scores["model.layers.0.mlp.experts"], scores["model.layers.1.mlp.experts"])


# Experts that no token reached


@pytest.mark.parametrize("name", MEASURED)
def test_unreached_experts_rank_below_every_reached_one_by_weight_norm(name):
    unreached = {0: [1, 3], 2: [0]}
    statistics = random_statistics(blocks=3, unreached=unreached)
    for block in statistics.blocks.values():
        block.weight_norm *= 50  # norms of real models are of any size
    # A reached atomic expert that never fired is a measured zero, and still worth more than what is unknown.
    first = statistics.blocks["model.layers.0.mlp.experts"]
    first.activation_sq_sum[0, 5] = first.gradient_sq_sum[0, 5] = first.fisher_sum[0, 5] = 0
    scores = importance(statistics, name)
    known, unknown, norms = [], [], []
    for index, (path, block) in enumerate(statistics.blocks.items()):
        for expert in range(block.num_experts):
            if expert in unreached.get(index, []):
                unknown.append(scores[path][expert])
                norms.append(block.weight_norm[expert])
            else:
                known.append(scores[path][expert])
    known, unknown, norms = torch.cat(known), torch.cat(unknown), torch.cat(norms)
    assert known.min() == 0 and len(unknown) == 24
    assert unknown.max() < known.min()
    assert torch.isfinite(unknown).all() and (unknown < 0).all()
    # Across blocks too, they rank among themselves by norm.
    assert unknown.argsort().tolist() == norms.argsort().tolist()


@pytest.mark.parametrize("name", MEASURED)
def test_the_scores_of_reached_experts_do_not_depend_on_unreached_ones(name):
    whole, holed = random_statistics(), random_statistics(unreached={0: [2]})
    for path, block in holed.blocks.items():
        expected, actual = importance(whole, name)[path], importance(holed, name)[path]
        assert torch.equal(actual[block.reached], expected[block.reached])


def test_magnitude_and_random_rank_unreached_experts_like_any_other():
    whole, holed = random_statistics(), random_statistics(unreached={0: [2]})
    for name in ("magnitude", "random"):
        for path in whole.blocks:
            assert torch.equal(importance(whole, name)[path], importance(holed, name)[path])


def test_weights_of_nothing_but_zeros_are_ranked_too():
    zeros = torch.zeros(2, 3)
    block = BlockStatistics(zeros, zeros, zeros, zeros, torch.tensor([4, 0]))
    scores = importance(AtomicStatistics({"experts": block}), "heapr")["experts"]
    assert torch.isfinite(scores).all() and scores[1].max() < scores[0].min()


def test_tiny_measurements_are_no_ties():
    """The product of two small means has to stay apart from zero and from its neighbours."""
    count = torch.tensor([10])
    squares = torch.tensor([[1e-24, 2e-24, 3e-24]])
    block = BlockStatistics(squares, squares, squares, torch.ones(1, 3), count)
    scores = importance(AtomicStatistics({"experts": block}), "heapr")["experts"][0]
    assert 0 < scores[0] < scores[1] < scores[2]
