# Licensed under the Apache License, Version 2.0
"""Merged statistics are those of one calibration on all the data; what does not fit is refused."""

import dataclasses

import pytest
import torch

from optimum_heapr import HeaprError
from optimum_heapr.calibration.merging import merge_statistics
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.calibration.statistics import AtomicStatistics
from optimum_heapr.criteria import importance
from optimum_heapr.criteria.obs import store_removal_curves
from optimum_heapr.text.samples import CalibrationData
from tests.helpers import assert_same_statistics, calibration_data, random_statistics, tiny_model


LENGTHS = (8, 5, 7, 8, 6)


def parts_and_whole(gram=False):
    model, data = tiny_model(dtype=torch.float64), calibration_data(*LENGTHS)
    pieces = [CalibrationData(data.samples[a:b], f"piece {a}", 0, 8) for a, b in ((0, 2), (2, 3), (3, 5))]
    return [calibrate(model, piece, gram=gram) for piece in pieces], calibrate(model, data, gram=gram)


@pytest.mark.parametrize("gram", [False, True])
def test_sums_add(gram, tmp_path):
    parts, whole = parts_and_whole(gram)
    merged = merge_statistics(parts)
    assert_same_statistics(merged, whole)
    for path, block in whole.blocks.items():
        for part in dataclasses.fields(block):
            expected = getattr(block, part.name)
            if expected is not None:
                torch.testing.assert_close(getattr(merged.blocks[path], part.name), expected)
    assert merged.fingerprint["loss"] == pytest.approx(whole.fingerprint["loss"], rel=1e-12)
    assert merged.num_tokens == whole.num_tokens
    data = merged.fingerprint["data"]
    assert data["source"] == "piece 0 + piece 2 + piece 3" and data["num_samples"] == 5
    assert data["merged"] == [part.fingerprint["data"] for part in parts]
    assert [source["name"] for source in data["sources"]] == ["piece 0", "piece 2", "piece 3"]
    merged.save(tmp_path / "merged")
    assert AtomicStatistics.load(tmp_path / "merged").fingerprint == merged.fingerprint


def test_merging_in_steps_is_merging_at_once():
    parts, _ = parts_and_whole()
    at_once, in_steps = merge_statistics(parts), merge_statistics([merge_statistics(parts[:2]), parts[2]])
    assert_same_statistics(in_steps, at_once, rtol=0)
    assert in_steps.fingerprint["data"] == at_once.fingerprint["data"]
    with pytest.raises(HeaprError, match=r"the data of 'piece 2' \(sha256 \w+\) are in two of them"):
        merge_statistics([in_steps, parts[1]])


def test_what_was_merged_is_left_as_it_was():
    parts, _ = parts_and_whole()
    before = [{path: block.fisher_sum.clone() for path, block in part.blocks.items()} for part in parts]
    merge_statistics(parts)
    for part, sums in zip(parts, before):
        assert all(torch.equal(part.blocks[path].fisher_sum, value) for path, value in sums.items())
        assert "merged" not in part.fingerprint["data"]


def other_data(**changes):
    statistics = random_statistics()
    fingerprint = {**statistics.fingerprint, "data": {**statistics.fingerprint["data"], "sha256": "other"}, **changes}
    return AtomicStatistics(statistics.blocks, fingerprint)


def with_block(statistics, **changes):
    path = next(iter(statistics.blocks))
    blocks = {**statistics.blocks, path: dataclasses.replace(statistics.blocks[path], **changes)}
    return AtomicStatistics(blocks, statistics.fingerprint)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: random_statistics(), "the data of 'random numbers' .* would count twice"),
        (lambda: other_data(seed=1), "seed is 0 in one and 1 in another; calibrate again with the same options"),
        (lambda: other_data(seq_length=7), "seq_length is 25 in one and 7 in another"),
        (
            lambda: other_data(model={**random_statistics().fingerprint["model"], "weights": "ffff"}),
            'made for a model with weights "0123456789abcdef", this model has "ffff"',
        ),
        (lambda: AtomicStatistics(random_statistics(3).blocks, other_data().fingerprint), "different expert blocks"),
        (lambda: with_block(other_data(), output_norm_sum=None), "output_norm_sum was measured in one and not in"),
        (
            lambda: with_block(other_data(), fisher_sum=torch.ones(4, 9)),
            r"fisher_sum has shape \(4, 8\) in one and \(4, 9",
        ),
        (
            lambda: with_block(other_data(), weight_norm=torch.ones(4, 8)),
            "the weights of .* differ; calibrate one model",
        ),
    ],
)
def test_what_does_not_fit_is_refused(other, match):
    with pytest.raises(HeaprError, match=match):
        merge_statistics([random_statistics(), other()])


def test_one_alone_is_refused():
    with pytest.raises(HeaprError, match="1 cannot be merged; name two or more"):
        merge_statistics([random_statistics()])


def test_removal_curves_are_of_one_part_and_are_not_added(tmp_path):
    """They were computed from the matrices of a part; those of all parts give others."""
    parts, whole = parts_and_whole(gram=True)
    for part in parts:
        store_removal_curves(part)
    merged = merge_statistics(parts)
    assert all(block.has_grams and not block.has_curves for block in merged.blocks.values())
    scores, expected = importance(merged, "obs"), importance(whole, "obs")
    for path in scores:
        torch.testing.assert_close(scores[path], expected[path])

    for index, part in enumerate(parts):
        part.save(tmp_path / str(index), grams=False)
    alone = [AtomicStatistics.load(tmp_path / str(index)) for index in range(len(parts))]
    with pytest.raises(HeaprError, match="removal curves without the matrices .* calibrate with keep_grams=True"):
        merge_statistics(alone)
