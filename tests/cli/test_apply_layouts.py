# Licensed under the Apache License, Version 2.0
"""`apply` cuts file by file unless it cannot or is told not to; stock layouts and alignment from the command line."""

import json

import pytest

import optimum_heapr.checkpoints.cutting as streaming

from .conftest import listing


@pytest.fixture
def streamed(monkeypatch):
    """How often a checkpoint was cut file by file."""
    calls, stream_plan = [], streaming.stream_plan

    def counted(*arguments):
        calls.append(arguments)
        stream_plan(*arguments)

    monkeypatch.setattr(streaming, "stream_plan", counted)
    return calls


@pytest.fixture
def uniform_plan(run, inputs, tmp_path):
    options = ("--ratio", "0.5", "--layout", "uniform", "--width-multiple", "2")
    assert run("plan", "-s", inputs.statistics, "-o", tmp_path / "uniform.safetensors", *options).status == 0
    return tmp_path / "uniform.safetensors"


@pytest.mark.parametrize("layout", ["variable", "uniform"])
def test_both_ways_write_the_same_files(run, inputs, uniform_plan, streamed, layout, tmp_path):
    plan = inputs.plan if layout == "variable" else uniform_plan
    options = ("apply", "-m", inputs.model, "-p", plan, "--max-shard-size", "20KB")
    assert run(*options, "-o", tmp_path / "streamed").status == 0
    assert len(streamed) == 1
    assert run(*options, "-o", tmp_path / "memory", "--in-memory").status == 0
    assert len(streamed) == 1
    assert listing(tmp_path / "streamed") == listing(tmp_path / "memory")
    assert len(list((tmp_path / "streamed").glob("model-*.safetensors"))) > 1


def test_packed_is_made_in_memory(run, inputs, streamed, tmp_path):
    assert run("apply", "-m", inputs.model, "-p", inputs.plan, "-o", tmp_path / "packed", "--packed").status == 0
    assert not streamed


def test_uniform_model_is_of_the_original_type(run, inputs, uniform_plan, tmp_path):
    assert run("apply", "-m", inputs.model, "-p", uniform_plan, "-o", tmp_path / "pruned").status == 0
    before = json.loads((inputs.model / "config.json").read_text())
    after = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert (after["model_type"], after["architectures"]) == (before["model_type"], before["architectures"])
    assert after["moe_intermediate_size"] == before["moe_intermediate_size"] // 2
    assert "auto_map" not in after


def test_impossible_alignment_exits_with_two_and_one_line(run, inputs, tmp_path):
    plan = ("plan", "-s", inputs.statistics, "-o", tmp_path / "p.safetensors", "--layout", "uniform")
    result = run(*plan, "--align-for", "gguf")
    assert result.status == 2 and "asks for multiples of 256" in result.error and result.error.count("\n") == 1
    result = run(*plan, "--ratio", "0.4", "--tensor-parallel", "4")
    assert result.status == 2 and "not a multiple of 4 (--tensor-parallel 4); nearest: " in result.error
    assert not (tmp_path / "p.safetensors").exists()


def test_a_width_that_transformers_refuses_is_said_and_measured_all_the_same(run, inputs, tmp_path, heapr_log):
    """Width 9 of 12: no rows of whole 16 bytes, which its default wants."""
    flags = ("--layout", "uniform", "--ratio", "0.25", "--eval-samples", "2", *inputs.calibration)
    result = run("prune", "-m", inputs.model, "-o", tmp_path / "odd", *flags)
    assert result.status == 0, result.error
    assert "refuses experts of width 9, which is no multiple of 4; plan for 8 (ratio 0.333)" in heapr_log.text
    report = json.loads((tmp_path / "odd" / "heapr" / "report.json").read_text())
    assert {"measured"} <= report["loss"].keys() and {"speed", "samples"} <= report.keys()
    text = ("--dataset", inputs.tokens, "--seq-length", "16")
    speed = ("--speed", "--prompt-length", "8", "--new-tokens", "2", "--repetitions", "1")
    result = run("evaluate", "-m", tmp_path / "odd", *text, *speed)
    assert result.status == 0, result.error
    training = ("--max-steps", "1", "--batch-size", "2", "--micro-batch-size", "2", "--num-samples", "8")
    teacher = ("--teacher", tmp_path / "odd", "--distillation-weight", "1")
    result = run("recover", "-m", tmp_path / "odd", "-o", tmp_path / "adapter", *text, *training, *teacher)
    assert result.status == 0, result.error
