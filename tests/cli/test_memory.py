# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr calibrate --memory`."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from optimum_heapr.calibration import streaming
from optimum_heapr.calibration.statistics import AtomicStatistics
from optimum_heapr.layerwise import memory
from tests.cli.conftest import listing


@pytest.mark.parametrize(
    ("flags", "available", "expected"),
    [
        ([], 2**40, "memory plain: needs"),
        ([], 2**10, "memory streaming: needs"),
        (["--memory", "streaming", "--activation-memory", "20KB"], 2**40, "memory streaming: needs"),
        (["--memory", "offload"], 2**40, "memory offload: needs"),
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
    assert result.status == 2 and "--memory offlaod: must be one of auto, plain, offload, streaming" in result.error


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
    assert result.status == 2 and result.error.count("\n") == 1 and "no such folder" in result.error


def test_prune_streaming(run, inputs, tmp_path):
    """From text to pruned folder without the model: the same weights as in memory."""
    flags = ["--ratio", "0.25", "--eval-samples", "0", *inputs.calibration]
    for mode in ("plain", "streaming", "offload"):
        output = ["-o", tmp_path / mode, "--memory", mode]
        result = run("prune", "-m", inputs.model, *output, *flags)
        assert result.status == 0, result.error
        assert "tokens/s, at most" in result.output and "Pruned model written" in result.output
        assert (tmp_path / mode / "model.safetensors").read_bytes() == (
            inputs.pruned / "model.safetensors"
        ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["offload", "plain", "streaming"]
    packed = run("prune", "-m", inputs.model, "-o", tmp_path / "packed", "--memory", "streaming", "--packed", *flags)
    assert packed.status == 2 and "leave --packed out, or pass --memory plain" in packed.error


def test_what_a_killed_run_left_on_the_disk_goes_with_the_next(run, inputs, tmp_path):
    left = tmp_path / ".out.0abcdef_.tmp" / "heapr-x"
    left.mkdir(parents=True)
    (left / "hidden.0.0.safetensors").write_text("tens of gigabytes")
    flags = ["--memory", "streaming", "--activation-memory", "1KB"]
    assert run("calibrate", "-m", inputs.model, "-o", tmp_path / "out", *inputs.calibration, *flags).status == 0
    assert list(listing(tmp_path)) == ["out"]


def test_streaming_is_resumed(run, inputs, tmp_path, monkeypatch):
    command = ["calibrate", "-m", inputs.model, "-o", tmp_path / "out", *inputs.calibration, "--memory", "streaming"]
    measured = streaming._Schedule._measure

    def interrupted(self, number, layer):
        if number == 0:
            raise KeyboardInterrupt
        return measured(self, number, layer)

    monkeypatch.setattr(streaming._Schedule, "_measure", interrupted)
    assert run(*command, "--save-every", 1).status == 130
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out.state"]
    assert "pass --resume" in run(*command, "--save-every", 1).error
    other = run(*command[:-1], "plain", "--resume")
    assert other.status == 2 and "go on with --memory streaming" in other.error
    assert run(*command, "--resume").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_bytes() == inputs.statistics.read_bytes()


def test_a_size_that_is_none_is_refused(run, inputs, tmp_path):
    flags = ["-m", inputs.model, "-o", tmp_path / "out", *inputs.calibration, "--activation-memory", "much"]
    result = run("calibrate", *flags)
    assert result.status == 2 and "--activation-memory much: must be a number of bytes" in result.error
