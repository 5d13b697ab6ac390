# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr estimate`."""

import json

import pytest

from tests.helpers import tiny_model


@pytest.fixture
def outline(tmp_path):
    """A folder that holds a configuration and nothing else."""
    tiny_model().config.save_pretrained(tmp_path / "outline")
    return tmp_path / "outline"


def test_estimate(outline, run):
    flags = ["--ratios", 0.25, 0.5, "--memory-of-gpu", "100kB", "--tflops", 1, "--bandwidth", 1]
    result = run("estimate", "-m", outline, *flags)
    assert result.status == 0, result.error
    parameters = tiny_model().num_parameters()
    assert f"{parameters:,} parameters" in result.output and "6 experts of 12 in 2 layers" in result.output
    rows = [line.split() for line in result.output.splitlines()]
    assert ["variable", "25.0%"] in [row[:2] for row in rows] and [row[0] for row in rows if row].count("uniform") >= 2
    assert [row[0] for row in rows[-3:]] == ["plain", "offload", "streaming"] and rows[-1][-1] == "min"


def test_every_size_says_whether_it_fits(outline, run):
    weights = 4 * tiny_model().num_parameters()
    flags = ["--ratios", 0.1, 0.25, 0.5, "--width-multiple", 1, "--dtype", "float32"]
    result = run("estimate", "-m", outline, *flags, "--memory-of-gpu", weights)
    assert result.status == 0, result.error
    sizes = [line.split() for line in result.output.splitlines() if line.startswith(("variable", "uniform"))]
    for layout in ("variable", "uniform"):
        verdicts = [row[-1] for row in sizes if row[0] == layout]
        assert verdicts == sorted(verdicts, reverse=True) and verdicts.count("fits") >= 2, (
            "what is smaller fits as well"
        )
    assert "time" not in result.output, "nobody said how fast"
    small = run("estimate", "-m", outline, *flags, "--memory-of-gpu", 10)
    assert small.output.count("does not fit at any ratio") == 2 and "fits" not in small.output
    assert "memory" not in run("estimate", "-m", outline, *flags).output.replace("--memory", "")


def test_json_has_all_of_it(outline, run):
    result = run("estimate", "-m", outline, "--ratios", 0.5, "--json")
    found = json.loads(result.output)
    assert found["size"]["parameters"] == tiny_model().num_parameters()
    assert {at["layout"] for at in found["pruned"]} == {"variable", "uniform"} and len(found["calibration"]) == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--ratios", 1.5], "--ratios 1.5: must be above 0 and below 1"),
        (["--memory-of-gpu", "much"], "--memory-of-gpu much: must be a number of bytes"),
        (["--dtype", "int4"], "--dtype int4: must be one of"),
        (["--tflops", -1], "--tflops -1: must be a positive number"),
        (["--tflops", 40], "--tflops 40, --bandwidth: the time takes both"),
        (["--seq-length", 1], "--seq-length 1"),
    ],
)
def test_refusals(flags, expected, outline, run):
    result = run("estimate", "-m", outline, *flags)
    assert result.status == 2 and result.output == "" and expected in result.error and result.error.count("\n") == 1


def test_a_dense_model_is_refused(run, tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path / "dense")
    result = run("estimate", "-m", tmp_path / "dense")
    assert result.status == 2 and result.error.count("\n") == 1
