# Licensed under the Apache License, Version 2.0
"""What a run took: tokens, time and memory of this process."""

import subprocess
import sys

import torch

from optimum_heapr.calibration.cost import Cost
from optimum_heapr.calibration.runner import calibrate
from tests.helpers import calibration_data, tiny_model


def test_the_cost_of_a_run():
    cost = calibrate(tiny_model(), calibration_data(8, 5, 7), batch_size=2).cost
    assert cost.tokens == 20 and cost.seconds > 0 and cost.peak_bytes > 2**20
    assert str(Cost(100, 2.0, 2**29)) == "50 tokens/s, at most 0.50 GiB of memory"


def test_the_peak_is_that_of_this_process():
    """Not, as the system reports it, of the one that started it."""
    code = "from optimum_heapr.calibration.cost import peak_resident_bytes; print(peak_resident_bytes())"
    ballast = torch.ones(2**28)  # 1 GiB
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ballast.sum() > 0 and 2**22 < int(result.stdout) < 2**30, result.stderr
