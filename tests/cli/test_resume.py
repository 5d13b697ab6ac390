# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr calibrate` killed and resumed."""

import shutil
import signal

import pytest

from optimum_heapr.calibration.statistics import AtomicStatistics
from optimum_heapr.surgery import layer_by_layer
from optimum_heapr.utils.logging import say_once
from tests.cli.conftest import listing, weights_and_settings
from tests.processes import start_python


# Kills itself in the middle of the micro-batch of a number.
KILLED = """
import os, sys, signal, torch
from optimum_heapr.calibration import runner
from optimum.commands.optimum_cli import main

number, at = int(sys.argv.pop(1)), int(sys.argv.pop(1))
measure, calls = runner._Measuring._measure, []

def killed(*arguments, **options):
    result = measure(*arguments, **options)
    calls.append(1)
    if len(calls) == at:
        os.kill(os.getpid(), number)
    return result

runner._Measuring._measure = killed
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_command_line_killed_and_resumed(number, run, inputs, tmp_path):
    output, state = tmp_path / "out.safetensors", tmp_path / "out.safetensors.state"
    command = ["calibrate", "-m", inputs.model, "-o", output, *inputs.calibration]
    process = start_python(KILLED, int(number), 4, "heapr", *command, "--save-every", 2, has="package")
    _, error = process.communicate()
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], error
    assert state.exists() and not output.exists()
    assert number != signal.SIGINT or f"{state} holds what was done, and --resume goes on from there" in error
    if number == signal.SIGKILL:
        refused = run(*command, "--save-every", 2)
        assert refused.status == 2 and "pass --resume" in refused.error
        refused = run(*command)
        assert refused.status == 2 and f"{state}: a calibration was interrupted here; pass --resume" in refused.error
        changed = run(*command, "--resume", "--seed", 5)
        assert changed.status == 2 and "seed was 0, is 5" in changed.error and state.exists()
    result = run(*command, "--resume")
    assert result.status == 0, result.error
    assert output.read_bytes() == inputs.statistics.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


def test_saving_does_not_take_the_place_of_the_output(run, inputs, tmp_path, monkeypatch):
    """Killed between the last micro-batch and the output, the run has its state still."""
    monkeypatch.setattr(AtomicStatistics, "save", lambda *_, **__: 1 / 0)
    command = ["calibrate", "-m", inputs.model, "-o", tmp_path / "out", *inputs.calibration, "--save-every", 4]
    with pytest.raises(ZeroDivisionError):
        run(*command)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out.state"]
    monkeypatch.setattr(
        "optimum_heapr.calibration.runner._Measuring._measure", lambda *_, **__: pytest.fail("it was measured already")
    )
    assert run(*command, "--resume").status == 0
    assert (tmp_path / "out").read_bytes() == inputs.statistics.read_bytes()


@pytest.mark.parametrize("memory", ["plain", "streaming"])
def test_prune_goes_on_with_what_was_measured(memory, run, inputs, tmp_path, monkeypatch):
    """What fails after hours of calibration, here while saving, does not take them with it."""
    output, state = tmp_path / "out", tmp_path / "out.state"
    command = ["prune", "-m", inputs.model, "-o", output, *inputs.calibration, "--memory", memory, "--save-every", 4]
    monkeypatch.setattr(AtomicStatistics, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*command)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [state]
    kept = listing(tmp_path)
    refused = run(*command)
    assert refused.status == 2 and "pass --resume" in refused.error and listing(tmp_path) == kept
    # Another ratio is another plan of the same statistics.
    planned = run(*command, "--resume", "--ratio", 0.5, "--dry-run")
    assert planned.status == 0 and "asked 50.00%" in planned.output and state.exists()
    assert f"A dry run leaves what it measures in {state}, and --resume goes on from there\n" in planned.output
    result = run(*command, "--resume")
    assert result.status == 0, result.error
    assert weights_and_settings(output) == weights_and_settings(inputs.pruned)
    assert list(tmp_path.iterdir()) == [output]


def test_prune_without_an_output_has_nowhere_to_save(run, inputs):
    result = run("prune", "-m", inputs.model, *inputs.calibration, "--dry-run", "--save-every", 4)
    assert result.status == 2 and "name the output with -o" in result.error


@pytest.mark.parametrize("more", [["--memory", "plain"], ["--memory", "streaming"], ["-s", "STATISTICS"]])
def test_nothing_is_saved_every_minus_one_micro_batches(more, run, inputs, tmp_path):
    more = [inputs.statistics if word == "STATISTICS" else word for word in more]
    result = run("prune", "-m", inputs.model, *inputs.calibration, "-o", tmp_path / "out", *more, "--save-every", -1)
    assert result.status == 2 and "--save-every -1: must be at least 0" in result.error
    assert not list(tmp_path.iterdir())


def test_blocks_that_were_fitted_stay_until_the_model_is_written(run, inputs, tmp_path, monkeypatch):
    plain, fitted = layer_by_layer._fitted, []

    def stopped(model, block, *arguments):
        if fitted:
            raise KeyboardInterrupt
        fitted.append(block.path)
        return plain(model, block, *arguments)

    def counted(model, block, *arguments):
        fitted.append(block.path)
        return plain(model, block, *arguments)

    output, fits, over_blocks = (
        tmp_path / "out",
        tmp_path / "out.fits",
        ["--compensate", "--compensation-scope", "block"],
    )
    assert run("plan", "-s", inputs.statistics, *over_blocks, "-o", tmp_path / "plan").status == 0
    for command in (
        ["prune", "-m", inputs.model, "-s", inputs.statistics, *over_blocks, *inputs.calibration, "-o", output],
        ["apply", "-m", inputs.model, "-p", tmp_path / "plan", *inputs.calibration, "-o", output],
    ):
        monkeypatch.setattr(layer_by_layer, "_fitted", stopped)
        result = run(*command, "--resume")
        assert result.status == 130 and not output.exists() and [file.name for file in fits.iterdir()], result.error
        expected = f"fits {fits}: a run was interrupted here while it fitted blocks; pass --resume to go on"
        refused = run(*command, *([] if command[0] == "apply" else ["--save-every", 1]))
        assert refused.status == 2 and expected in refused.error
        fitted.clear()
        monkeypatch.setattr(layer_by_layer, "_fitted", counted)
        result = run(*command, "--resume")
        assert result.status == 0 and len(fitted) == 1, result.error
        assert (output / "config.json").is_file() and not fits.exists()
        shutil.rmtree(output)
        fitted.clear()


def test_that_there_is_nothing_to_go_on_from_is_said(run, inputs, tmp_path, heapr_log):
    """In the terms of the command line; what is done all the same is the whole of it."""
    say_once.cache_clear()
    over_blocks = ["--compensate", "--compensation-scope", "block"]
    measured = ["-m", inputs.model, *inputs.calibration]
    nothing = "--resume finds nothing there to go on from; it begins anew"
    for name, command, said in [
        ("a", ["calibrate", *measured], [f"state {tmp_path / 'a.state'}: {nothing}"]),
        ("b", ["calibrate", *measured, "--memory", "streaming"], [f"state {tmp_path / 'b.state'}: {nothing}"]),
        (
            "c",
            [
                "prune",
                *measured,
                "-s",
                inputs.statistics,
                *over_blocks,
                "--save-every",
                3,
            ],  # of use: the fits are kept
            [f"fits {tmp_path / 'c.fits'}: {nothing}"],
        ),
        (
            "d",
            ["prune", "-m", inputs.model, "-s", inputs.statistics, "--save-every", 3],
            [
                "--save-every 3: has no use, as nothing is calibrated and no block is fitted",
                "--resume: has no use, as nothing is calibrated and no block is fitted",
            ],
        ),
    ]:
        heapr_log.clear()
        result = run(*command, "-o", tmp_path / name, "--resume")
        assert result.status == 0, result.error
        found = [
            record.getMessage()
            for record in heapr_log.records
            if "--resume" in record.getMessage() or "use" in record.getMessage()
        ]
        assert found == said


def test_a_state_that_a_run_has_no_use_for_is_left_alone(run, inputs, tmp_path):
    """Nothing is calibrated with statistics at hand, so nothing is begun anew, gone on from, or done with."""
    state = tmp_path / "out.state"
    state.write_bytes(b"of hours")
    command = ["prune", "-m", inputs.model, "-o", tmp_path / "out"]
    refused = run(*command, *inputs.calibration)
    assert refused.status == 2 and f"{state}: a calibration was interrupted here; pass --resume" in refused.error
    for flags in ([], ["--resume", "--overwrite"]):
        result = run(*command, "-s", inputs.statistics, *flags)
        assert result.status == 0, result.error
        assert state.read_bytes() == b"of hours"


def test_a_folder_that_no_calibration_wrote_is_not_called_one(run, inputs, tmp_path):
    state = tmp_path / "out.state"
    state.mkdir()
    (state / "run.json").write_text("{}")  # as `recover` does
    refused = run("prune", "-m", inputs.model, "-o", tmp_path / "out", *inputs.calibration, "--memory", "streaming")
    assert refused.status == 2 and f"{state}: is a folder that no calibration wrote" in refused.error
