# Licensed under the Apache License, Version 2.0
"""The estimate says what a run takes."""

import torch

from optimum_heapr import HeaprConfig
from optimum_heapr.calibration.estimate import MemoryEstimate
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.layerwise import memory
from optimum_heapr.text.samples import load_calibration_data
from tests.helpers import tiny_model


def test_the_estimate(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**20)
    model = tiny_model(dtype=torch.bfloat16)
    config = HeaprConfig(batch_size=2, seq_length=16)
    estimate = MemoryEstimate.of(model, config)
    assert estimate.weights == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert estimate.statistics == 4 * 3 * 2 * 6 * 12
    assert MemoryEstimate.of(model, config.replace(statistics="gram")).statistics == 4 * 2 * 6 * (3 * 12 + 2 * 144)
    assert MemoryEstimate.of(model, config.replace(skip_nonfinite=True)).statistics == 2 * estimate.statistics
    assert MemoryEstimate.of(model, config.replace(batch_size=4)).activations == 2 * estimate.activations
    assert estimate.fits
    monkeypatch.setattr(memory, "available_bytes", lambda device: estimate.weights)
    assert not MemoryEstimate.of(model, config).fits
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert MemoryEstimate.of(model, config).available == estimate.weights // 2
    assert "GiB for weights, 0.00 GiB for statistics and about" in str(estimate)


def test_the_estimate_of_streaming(monkeypatch):
    """A layer, or embeddings and head; the inputs of all layers, as far as the budget goes."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**20)
    model = tiny_model(num_hidden_layers=4)
    config = HeaprConfig(batch_size=2, seq_length=16, num_samples=8, statistics="gram")
    plain, estimate = MemoryEstimate.of(model, config), MemoryEstimate.of(model, config, "streaming", 10_000)
    layer = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    head = 4 * (2 * 320 * 32 + 32)
    assert estimate.weights == max(layer, head) < plain.weights
    assert estimate.statistics == plain.statistics / 4
    assert estimate.activations < plain.activations
    assert estimate.layer_inputs == 6 * 8 * 16 * 32 * 4 and estimate.layer_inputs_on_host == 10_000
    assert MemoryEstimate.of(model, config, "streaming").layer_inputs_on_host == estimate.layer_inputs
    assert "streaming: needs" in str(estimate) and "GiB of disk for the inputs of all layers" in str(estimate)


def test_activations_are_about_what_a_run_allocates():
    """By the allocations of torch, which the load of the machine does not change; `benchmarks/activations.py` has resident memory."""
    from torch.profiler import ProfilerActivity, profile

    model, tokenizer = load_model("demo", dtype="float32")
    config = HeaprConfig(dataset="demo", num_samples=2, seq_length=256)
    data = load_calibration_data(config, tokenizer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        calibrate(model, data)
    now = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    estimate = MemoryEstimate.of(model, config)
    assert most / 1.25 < estimate.activations + estimate.statistics < 2 * most
