# Licensed under the Apache License, Version 2.0
"""What can be refused without measuring is refused before it, and what was measured is kept."""

import shutil

import pytest

from optimum_heapr import AtomicStatistics
from optimum_heapr.utils.errors import HeaprError
from tests.quantized_checkpoints import in_fp8


REFUSED_BY_SHAPES = (
    ["--target-size", "1KB"],
    ["--ratio", 0.5, "--min-width", 11],
    ["--ratio", 0.6, "--protect", "*.0.*"],
    ["--width-multiple", 13],
    ["--ratio", 0.01, "--width-multiple", 12],
    ["--prompt", ""],
)


@pytest.mark.parametrize("flags", REFUSED_BY_SHAPES, ids=lambda flags: " ".join(map(str, flags)))
def test_what_shapes_refuse_is_refused_before_anything_is_measured(flags, run, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_heapr.pruner.HeaprPruner.calibrate", lambda *_, **__: pytest.fail("it was measured"))
    result = run("prune", "-m", inputs.model, "-o", tmp_path / "out", *inputs.calibration, *flags)
    assert result.status == 2 and result.error.count("\n") == 1, result.error
    assert not list(tmp_path.iterdir())


# Flags, the rows and columns of an FP8 block of a model whose experts are 12 wide, and what is said
NO_WHOLE_BLOCKS = (
    (["--ratio", 0.25], 4, "the width 9 is no multiple of the 4 weights"),
    (["--ratio", 0.5, "--width-multiple", 2], 4, "the width 6 is no multiple of the 4 weights"),
    (
        ["--layout", "padded", "--ratio", 0.5, "--width-multiple", 2],
        4,
        "widths will be multiples of 2, not of the 4 weights",
    ),
    (["--max-loss-increase", 0.1], 4, "widths will be multiples of 1, not of the 4 weights"),
    (["--ratio", 0.5], 16, "16 weights share a scale, and experts of this model are 12 wide; leave it out"),
)


@pytest.mark.parametrize(("flags", "block", "said"), NO_WHOLE_BLOCKS, ids=str)
def test_a_width_of_no_whole_blocks_is_refused_before_anything_is_measured(
    flags, block, said, run, inputs, tmp_path, monkeypatch
):
    monkeypatch.setattr("optimum_heapr.pruner.HeaprPruner.calibrate", lambda *_, **__: pytest.fail("it was measured"))
    model = in_fp8(shutil.copytree(inputs.model, tmp_path / "model"), block)
    flags = [*inputs.calibration, "--dequantize", "--requantize", "--layout", "uniform", *flags]
    result = run("prune", "-m", model, "-o", tmp_path / "out", *flags)
    assert result.status == 2 and f"--requantize: {said}" in result.error and result.error.count("\n") == 1, (
        result.error
    )
    assert block > 12 or "plan with --width-multiple 4" in result.error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_last_model_of_evaluate_is_looked_for_before_the_first_is_measured(run, inputs, tmp_path, monkeypatch):
    add = "optimum_heapr.evaluation.comparison.Comparison.add"
    monkeypatch.setattr(add, lambda *_, **__: pytest.fail("it was measured"))
    result = run("evaluate", "-m", inputs.model, tmp_path / "none", "--dataset", inputs.text, "--seq-length", 24)
    assert result.status == 2 and f"--model {tmp_path / 'none'}: no such folder" in result.error


def test_the_published_text_is_looked_for_before_a_model_is_loaded(run, inputs, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise HeaprError("dataset='Salesforce/wikitext': cannot be loaded")

    monkeypatch.setattr("optimum_heapr.text.protocols.open_dataset", offline)
    monkeypatch.setattr("optimum_heapr.checkpoints.loading.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    for command in (
        ["prune", "-o", tmp_path / "out", *inputs.calibration, "--eval-dataset", "wikitext2"],
        ["evaluate", "--dataset", "wikitext2"],
    ):
        result = run(command[0], "-m", inputs.model, *command[1:])
        assert result.status == 2 and "Salesforce/wikitext" in result.error, result.error


def test_statistics_are_kept_as_soon_as_they_are_measured(run, inputs, tmp_path, monkeypatch):
    """In a dry run, and where something fails after them; they serve in place of calibrating, compensation and all."""
    kept, more = tmp_path / "kept", ["--criterion", "obs", "--compensate"]
    command = ["prune", "-m", inputs.model, *inputs.calibration, *more, "--save-statistics", kept]
    result = run(*command, "--dry-run")
    assert result.status == 0 and f"Statistics written to {kept}" in result.output, result.error
    assert list(tmp_path.iterdir()) == [kept] and AtomicStatistics.load(kept).has_grams
    assert run(*command, "--dry-run").status == 2, "they are not written over"

    assert "A dry run keeps no statistics; --save-statistics FILE does" in run(*command[:-2], "--dry-run").output

    kept.unlink()
    monkeypatch.setattr("optimum_heapr.pruner.HeaprPruner.apply", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*command, "-o", tmp_path / "out")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [kept]
    result = run("prune", "-m", inputs.model, "-s", kept, "-o", tmp_path / "out", *more)
    assert result.status == 0, result.error


@pytest.mark.parametrize("more", [[], ["--criterion", "obs", "--compensate"]], ids=["heapr", "obs"])
def test_what_fails_after_measuring_leaves_the_statistics(more, run, inputs, tmp_path, monkeypatch):
    """Beside the output, by a name of their own, until that is written; the message says so in its one line."""
    command = ["prune", "-m", inputs.model, "-o", tmp_path / "out", *inputs.calibration, *more]
    kept = tmp_path / "out.statistics.safetensors"

    def fails(*_, **__):
        raise HeaprError("output: the disk is full")

    monkeypatch.setattr("optimum_heapr.pruner.HeaprPruner.save_pretrained", fails)
    result = run(*command)
    assert result.status == 2 and result.error.count("\n") == 1
    assert f"the disk is full; what was measured is in {kept}, and -s {kept} goes on from that" in result.error
    assert list(tmp_path.iterdir()) == [kept]
    monkeypatch.undo()

    result = run(*command)
    assert result.status == 2 and f"a run that failed after calibrating left them; pass -s {kept}" in result.error
    result = run("prune", "-m", inputs.model, "-o", tmp_path / "out", "-s", kept, *more)
    assert result.status == 0, result.error
    kept.unlink()
    assert run(*command[:4], tmp_path / "again", *command[5:]).status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"], "gone when the output is there"


def test_a_disk_too_full_for_the_statistics_stops_nothing(run, inputs, tmp_path, monkeypatch, heapr_log):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("optimum_heapr.calibration.statistics.AtomicStatistics.save", full)
    monkeypatch.setattr("optimum_heapr.pruner.HeaprPruner.apply", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("prune", "-m", inputs.model, "-o", tmp_path / "out", *inputs.calibration)
    assert "The statistics are kept in memory alone" in heapr_log.text and not list(tmp_path.iterdir())
