# Licensed under the Apache License, Version 2.0
"""Scores of a really trained model against those of the published implementation, on the same token ids."""

import pytest
import torch
from safetensors.torch import load_file

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.criteria import importance
from tests.helpers import needs_shared, shared_folder


pytestmark = [pytest.mark.slow, needs_shared]


@pytest.fixture(scope="module")
def scores():
    """Ours and the published ones by block; atomic experts of unreached experts are -1 in the latter."""
    folder = shared_folder()
    config = HeaprConfig(dataset=str(folder / "reference" / "calibration_ids.jsonl"), seq_length=256, batch_size=8)
    pruner = HeaprPruner.from_pretrained(folder / "models" / "moe-a", config, dtype=torch.float32)
    statistics = pruner.calibrate()
    published = load_file(folder / "reference" / "heapr_published_scores.safetensors")
    return statistics, published


def flat(statistics, published):
    """All atomic experts of all blocks in one row: ours, the published ones, and whether the expert was reached."""
    ours = importance(statistics, "heapr")
    reached = [block.reached.unsqueeze(1).expand(-1, block.width) for block in statistics.blocks.values()]
    return (
        torch.cat([score.flatten() for score in ours.values()]).double(),
        torch.cat([published[path].flatten() for path in ours]).double(),
        torch.cat([mask.flatten() for mask in reached]),
    )


def test_the_same_rows_were_measured(scores):
    statistics, published = scores
    assert statistics.fingerprint["data"]["num_samples"] == 128
    assert statistics.num_tokens == 128 * 256
    assert set(published) == set(statistics.blocks)


def test_the_same_experts_were_reached(scores):
    _, published, reached = flat(*scores)
    assert torch.equal(published >= 0, reached)
    assert int((~reached).sum()) == 576  # six experts of 96


def test_scores_are_the_published_ones_up_to_one_factor(scores):
    ours, published, reached = flat(*scores)
    ours, published = ours[reached], published[reached]
    factor = (ours.sum() / published.sum()).item()
    torch.testing.assert_close(ours, factor * published, rtol=1e-3, atol=0)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_same_atomic_experts_are_kept(scores, ratio):
    """Among the experts that tokens reached; the others are where this package differs on purpose."""
    ours, published, reached = flat(*scores)
    ours, published = ours[reached], published[reached]
    count = round(ratio * len(ours))
    gone = [set(values.argsort(stable=True)[:count].tolist()) for values in (ours, published)]
    assert len(gone[0]) == count and gone[0] == gone[1]


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_plan_is_that_of_the_published_scores(scores, ratio):
    """Through allocation too: published scores with their unreached experts put in order by ours, kept set for kept set."""
    from optimum_heapr.planning.plan import PruningPlan

    statistics, published = scores
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=ratio))
    ours, theirs, reached = flat(statistics, published)
    combined = torch.where(reached, theirs, ours)
    gone = set(combined.argsort(stable=True)[: round(ratio * len(combined))].tolist())
    kept, start = set(), 0
    for path, experts in plan.kept.items():
        for indices in experts:
            kept |= {start + index for index in indices.tolist()}
            start += plan.original_width[path]
    assert kept == set(range(len(combined))) - gone
