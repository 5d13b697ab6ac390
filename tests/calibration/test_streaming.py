# Licensed under the Apache License, Version 2.0
"""Calibration layer by layer gives the statistics of the plain run, from a checkpoint whose weights are read twice."""

import pytest
import torch

from optimum_heapr import HeaprConfig
from optimum_heapr.calibration.data import CalibrationData
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.calibration.streaming import calibrate_streaming
from optimum_heapr.checkpoint import SourceCheckpoint
from optimum_heapr.families import TESTED
from optimum_heapr.loading import load_model
from optimum_heapr.planning.plan import PruningPlan
from optimum_heapr.utils.tensor_files import checkpoint_files
from tests.helpers import assert_same_statistics
from tests.modeling.test_families import make_model


def streamed(folder, data, work, **options):
    """Statistics, and where the weights came from."""
    skeleton, _ = load_model(folder, skeleton=True)
    source = SourceCheckpoint(skeleton, checkpoint_files(str(folder)))
    work.mkdir(exist_ok=True)
    return calibrate_streaming(skeleton, source, data, work, **options), source


def padded_data(vocabulary=96):
    ids = torch.randint(3, vocabulary, (7, 24), generator=torch.Generator().manual_seed(1))
    return CalibrationData([row[: 24 - 5 * (number % 3)] for number, row in enumerate(ids)], "random", 0, 24)


@pytest.mark.parametrize("model_type", TESTED)
def test_every_family_gives_the_statistics_of_the_plain_run(model_type, tmp_path):
    make_model(model_type).save_pretrained(tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    data = padded_data()
    plain = calibrate(model, data, batch_size=2, gram=True)
    statistics, _ = streamed(tmp_path / "model", data, tmp_path / "work", batch_size=2, gram=True)
    assert_same_statistics(statistics, plain, rtol=1e-5)
    assert statistics.fingerprint == plain.fingerprint
    for path, block in plain.blocks.items():
        assert torch.equal(statistics.blocks[path].weight_norm, block.weight_norm)
        for name in ("activation_gram_sum", "gradient_gram_sum"):
            expected = getattr(block, name)
            torch.testing.assert_close(
                getattr(statistics.blocks[path], name), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
            )
    config = HeaprConfig(ratio=0.3)
    kept = PruningPlan.build(statistics, config).kept
    for path, experts in PruningPlan.build(plain, config).kept.items():
        assert all(torch.equal(one, other) for one, other in zip(kept[path], experts, strict=True))
