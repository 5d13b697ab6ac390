# Licensed under the Apache License, Version 2.0
"""Two processes, each with its share of the samples, measure what one process does."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from optimum_heapr import HeaprError
from optimum_heapr.calibration.processes import check_placement
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.calibration.statistics import AtomicStatistics
from tests.helpers import assert_same_statistics, calibration_data, repository, tiny_model


LENGTHS = (16, 7, 12, 16, 3)

SCRIPT = f"""
import os, sys, torch
torch.set_num_threads(1)
from optimum_heapr import HeaprError
from optimum_heapr.calibration.processes import check_placement
from optimum_heapr.calibration.runner import calibrate
from tests.helpers import calibration_data, tiny_model
statistics = calibrate(tiny_model(dtype=torch.float64), calibration_data(*{LENGTHS}), batch_size=2, gram=True)
statistics.save(os.path.join(sys.argv[1], os.environ["RANK"]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    """Three micro-batches for two processes: one gets two of them, and samples of different length."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(repository()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors

    expected = calibrate(tiny_model(dtype=torch.float64), calibration_data(*LENGTHS), batch_size=2, gram=True)
    for rank in range(2):
        actual = AtomicStatistics.load(tmp_path / str(rank))
        assert_same_statistics(actual, expected)
        assert actual.fingerprint["loss"] == pytest.approx(expected.fingerprint["loss"], rel=1e-12)
        for path, block in expected.blocks.items():
            for name in ("output_norm_sum", "activation_gram_sum", "gradient_gram_sum"):
                torch.testing.assert_close(getattr(actual.blocks[path], name), getattr(block, name))
            assert torch.equal(actual.blocks[path].weight_norm, block.weight_norm)


def test_a_model_spread_over_devices_is_for_one_process():
    model = tiny_model()
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}
    check_placement(model, 1)
    with pytest.raises(
        HeaprError, match="device_map: spreads the model over 0, 1, cpu, and each of 2 processes would"
    ):
        check_placement(model, 2)
    model.hf_device_map = {"": 1}
    check_placement(model, 2)
