# Licensed under the Apache License, Version 2.0
"""What is said of memory where there are CUDA devices; the devices themselves are made up."""

import pytest
import torch

from optimum_heapr import HeaprConfig
from optimum_heapr.calibration.cost import measured_cost
from optimum_heapr.calibration.estimate import MemoryEstimate
from optimum_heapr.layerwise.memory import available_bytes
from optimum_heapr.utils import memory
from tests.helpers import tiny_model


@pytest.fixture
def two_gpus(monkeypatch):
    """Of 1000 bytes each, of which PyTorch has taken 700 and given 400 and 600 to tensors at most, 300 now."""
    peaks = {0: 400, 1: 600}
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    for name, answer in {
        "is_available": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "mem_get_info": lambda device: (300, 1000),
        "memory_reserved": lambda device: 700,
        "memory_allocated": lambda device: 300,
        "max_memory_allocated": peaks.__getitem__,
        "reset_peak_memory_stats": lambda device: peaks.update({device: 300}),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)


def test_a_model_over_several_gpus_has_the_peaks_of_all(two_gpus):
    assert memory.peak_memory() == 1000
    memory.reset_peak_memory()
    assert memory.peak_memory() == 600
    with measured_cost() as cost:
        pass
    assert cost.peak_bytes == 600


def test_what_pytorch_keeps_of_tensors_that_are_gone_is_available(two_gpus):
    assert available_bytes(torch.device("cuda", 1)) == 700


def test_each_process_of_a_launch_looks_at_its_own_gpu(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    estimate = MemoryEstimate.of(tiny_model(), HeaprConfig())
    assert estimate.device == torch.device("cuda", 1) and estimate.available == 700


def test_gpus_do_not_matter_where_the_cpu_was_asked_for(two_gpus, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert memory.peak_memory() > 2**20
    assert MemoryEstimate.of(tiny_model(), HeaprConfig()).device == torch.device("cpu")
    with measured_cost() as cost:
        pass
    assert cost.peak_bytes > 2**20
