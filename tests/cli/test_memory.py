# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr calibrate --memory`."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from optimum_heapr.calibration import memory
from optimum_heapr.calibration.statistics import AtomicStatistics
from tests.cli.conftest import listing


@pytest.mark.parametrize(
    ("flags", "available", "expected"),
    [
        ([], 2**40, "plain: needs"),
        ([], 2**10, "streaming: needs"),
        (["--memory", "streaming", "--activation-memory", "20KB"], 2**40, "streaming: needs"),
        (["--memory", "offload"], 2**40, "offload: needs"),
        (["--memory", "plain"], 2**10, None),
        (["--device-map", "cpu"], 2**10, None),
    ],
)
def test_memory(flags, available, expected, run, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: available)
    result = run("calibrate", "-m", inputs.model, "-o", tmp_path / "out", *inputs.calibration, *flags)
    assert result.status == 0, result.error
    first = result.output.splitlines()[0]
    assert first.startswith(expected) if expected else "needs" not in result.output
    assert "tokens/s, at most" in result.output
    assert list(listing(tmp_path)) == ["out"]
    expected = AtomicStatistics.load(inputs.statistics)
    for path, block in AtomicStatistics.load(tmp_path / "out").blocks.items():
        torch.testing.assert_close(block.fisher_sum, expected.blocks[path].fisher_sum, rtol=1e-6, atol=0)


def test_a_word_that_is_none_of_them_is_refused(run, inputs, tmp_path):
    flags = ["-m", inputs.model, "-o", tmp_path / "out", *inputs.calibration, "--memory", "offlaod"]
    result = run("calibrate", *flags)
    assert result.status == 2 and "memory='offlaod': must be one of auto, plain, offload, streaming" in result.error


def test_weights_that_are_no_safetensors_have_no_estimate(run, inputs, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(inputs.model, model)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    result = run("calibrate", "-m", model, "-o", tmp_path / "out", *inputs.calibration)
    assert result.status == 0 and "needs" not in result.output, result.error
    assert (tmp_path / "out").read_bytes() == inputs.statistics.read_bytes()


def test_a_model_that_is_missing_is_refused_once(run, inputs, tmp_path):
    result = run("calibrate", "-m", tmp_path / "none", "-o", tmp_path / "out", *inputs.calibration)
    assert result.status == 2 and result.error.count("\n") == 1 and "cannot be loaded" in result.error
