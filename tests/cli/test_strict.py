# Licensed under the Apache License, Version 2.0
"""`prune --strict`: a model whose loss jumped is not written."""

import json

import pytest

from optimum_heapr import HeaprConfig, HeaprPruner


TEXT = ("--eval-dataset", "demo", "--eval-samples", 5, "--seq-length", 96)


@pytest.fixture(scope="module")
def lying(tmp_path_factory):
    """Statistics of the demonstration model that say of one layer that it does nothing."""
    path = tmp_path_factory.mktemp("lying") / "statistics.safetensors"
    pruner = HeaprPruner.from_pretrained("demo", HeaprConfig(dataset="demo", num_samples=8, seq_length=96))
    statistics = pruner.calibrate()
    statistics.blocks["model.layers.1.mlp.experts"].activation_sq_sum *= 1e-9
    statistics.save(path)
    return path


def test_a_jump_is_said_in_the_report_and_refused_if_that_is_asked_for(lying, run, tmp_path):
    flags = ("prune", "-m", "demo", "-s", lying, "--dtype", "float32", *TEXT)
    refused = run(*flags, "-o", tmp_path / "refused", "--strict")
    assert refused.status == 2 and not (tmp_path / "refused").exists()
    (line,) = [line for line in refused.error.splitlines() if "error:" in line]
    for part in ("--strict: the loss rose by +", "model.layers.1 did it", "--protect 'model.layers.1.*'"):
        assert part in line

    written = run(*flags, "-o", tmp_path / "written")
    assert written.status == 0 and "model.layers.1 did it" in written.error
    folder = tmp_path / "written" / "heapr"
    found = json.loads((folder / "report.json").read_text())["loss"]["jump"]
    assert found["layer"] == "model.layers.1" and found["restored"] < 0.25 * found["increase"]
    for name in ("report.md", "report.html"):
        assert "Look at this before you use it: the loss rose by" in (folder / name).read_text()
    assert "model.layers.1 did it" in (tmp_path / "written" / "README.md").read_text()


def test_what_is_sane_is_written(inputs, run, tmp_path):
    flags = ("-m", inputs.model, *inputs.calibration, "--eval-samples", 2, "--strict")
    assert run("prune", *flags, "-o", tmp_path / "pruned").status == 0
    assert (tmp_path / "pruned" / "config.json").is_file()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--eval-samples", 0], "--strict: looks at what is measured, and --eval-samples 0 measures nothing"),
        (["--dry-run"], "--strict: looks at what is measured, and a dry run measures nothing"),
        (["--memory", "streaming"], "--strict: looks at what is measured with the model in memory"),
    ],
)
def test_what_would_not_be_measured_is_refused_before_work_is_spent(flags, expected, inputs, run, tmp_path):
    result = run("prune", "-m", inputs.model, *inputs.calibration, "--strict", *flags, "-o", tmp_path / "pruned")
    assert result.status == 2 and expected in result.error and not (tmp_path / "pruned").exists()


def test_statistics_without_text_to_measure_on_are_refused(inputs, run, tmp_path):
    result = run("prune", "-m", inputs.model, "-s", inputs.statistics, "--strict", "-o", tmp_path / "pruned")
    assert result.status == 2 and "--strict: nothing was measured" in result.error
    assert not (tmp_path / "pruned").exists()
