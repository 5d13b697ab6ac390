# Licensed under the Apache License, Version 2.0
"""Ctrl-C or a kill at any moment leaves the old output or none, never a torn one."""

import os
import shutil
import signal

import pytest

from optimum_heapr import AtomicStatistics
from optimum_heapr.utils.files import replace_folder
from tests.cli.conftest import listing
from tests.processes import start_python


# (module or class, function) to be interrupted in: while measuring, planning, cutting, writing, putting in place.
MOMENTS = {
    "loading": ("optimum_heapr.checkpoints.loading", "load_model"),
    "calibrating": ("optimum_heapr.checkpoints.loaded", "calibrate"),
    "cutting": ("optimum_heapr.checkpoints.loaded", "apply_plan"),
    "writing weights": ("transformers.PreTrainedModel", "save_pretrained"),
    "writing the plan": ("optimum_heapr.PruningPlan", "save"),
    "putting in place": ("shutil", "rmtree"),
}


def interrupted_after(monkeypatch, home: str, name: str):
    """The function does its work once, and then Ctrl-C comes."""
    from pkgutil import resolve_name

    home = resolve_name(home)
    function = getattr(home, name)
    calls = []

    def interrupted(*args, **kwargs):
        result = function(*args, **kwargs)
        if name == "rmtree" and not str(args[0]).endswith(".tmp"):
            return result  # a temporary folder of a library
        calls.append(name)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(home, name, interrupted)
    return calls


def old_output(folder) -> dict[str, bytes | None]:
    """Writes what an earlier run left, and returns it."""
    with replace_folder(folder) as temporary:
        (temporary / "weights").write_text("old")
    return listing(folder)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_ctrl_c_in_prune(moment, old, run, inputs, tmp_path, monkeypatch):
    output = tmp_path / "out"
    if old:
        old_output(output)
    before = listing(tmp_path)
    calls = interrupted_after(monkeypatch, *MOMENTS[moment])
    result = run("prune", "-m", inputs.model, "-o", output, "--overwrite", *inputs.calibration)
    assert calls, "the function was never reached"
    kept = tmp_path / "out.statistics.safetensors"  # what was measured, from then on
    if moment not in ("loading", "calibrating"):
        assert f"interrupted; what was measured is in {kept}, and -s {kept} goes on" in result.error
        AtomicStatistics.load(kept)
        kept.unlink()
    if moment == "putting in place":  # the new output is there by then
        assert listing(output).keys() == listing(inputs.pruned).keys()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    else:
        assert listing(tmp_path) == before
    assert result.status == 130 and result.error.count("\n") == 1 and "interrupted" in result.error


def test_ctrl_c_while_blocks_are_fitted_says_where_they_are(run, inputs, tmp_path, monkeypatch):
    from optimum_heapr.surgery import layer_by_layer

    plan, output = tmp_path / "plan", tmp_path / "out"
    flags = ("-s", inputs.statistics, "--ratio", 0.5, "--compensate", "--compensation-scope", "block", "-o", plan)
    assert run("plan", *flags).status == 0
    apply = ("apply", "-m", inputs.model, "-p", plan, *inputs.calibration, "-o", output, "--resume")
    with monkeypatch.context() as patch:
        interrupted_after(patch, "optimum_heapr.surgery.fit_files.FitFiles", "write")
        result = run(*apply)
    fits = tmp_path / "out.fits"
    assert result.status == 130 and f"interrupted; {fits} holds what was done, and --resume goes on" in result.error
    assert len(list(fits.iterdir())) == 1 and not output.exists()
    fitted = interrupted_after(monkeypatch, *(layer_by_layer.__name__, "_fitted"))
    assert run(*apply).status == 130 and len(fitted) == 1  # the other
    assert len(list(fits.iterdir())) == 1
    monkeypatch.undo()
    line = "compensation: mean relative squared error of the routed outputs of 2 layers"
    assert run(*apply).output.count(line) == 1
    assert not fits.exists() and output.exists()


@pytest.mark.parametrize("command", ["calibrate", "plan"])
def test_ctrl_c_while_writing_a_file(command, run, inputs, tmp_path, monkeypatch):
    output = tmp_path / "out"
    shutil.copy(inputs.plan, output)
    calls = interrupted_after(monkeypatch, "optimum_heapr.utils.tensor_files", "write_tensors")
    flags = ["-s", inputs.statistics] if command == "plan" else ["-m", inputs.model, *inputs.calibration]
    assert run(command, "-o", output, "--overwrite", *flags).status == 130
    assert calls and listing(tmp_path) == {"out": inputs.plan.read_bytes()}


def test_an_error_while_writing_leaves_the_old_output(run, inputs, tmp_path, monkeypatch):
    """A full disk, for instance: no foreseen mistake, so the error itself comes through."""
    from transformers import PreTrainedModel

    def full(self, folder, **options):
        (folder / "model.safetensors").write_bytes(b"torn")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    old_output(tmp_path / "out")
    before = listing(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        run("prune", "-m", inputs.model, "-s", inputs.statistics, "-o", tmp_path / "out", "--overwrite")
    assert listing(tmp_path) == before


# Says when the worst moment has come, all weights written and nothing in place, and stays in it.
STALLED = """
import sys, time
from transformers import PreTrainedModel
from optimum.commands.optimum_cli import main

def stalled(write):
    def write_and_wait(self, *args, **kwargs):
        write(self, *args, **kwargs)
        print("written", flush=True)
        time.sleep(600)
    return write_and_wait

PreTrainedModel.save_pretrained = stalled(PreTrainedModel.save_pretrained)
main()
"""


def arguments_of(inputs, output) -> list:
    return ["-m", inputs.model, "-o", output, "--overwrite", "-s", inputs.statistics]


@pytest.mark.parametrize("command", ["apply", "prune"])
def test_what_an_earlier_calibration_left_is_not_said_to_be_gone_on_from(command, run, inputs, tmp_path, monkeypatch):
    """Neither of these calibrates here."""
    (tmp_path / "out.state").write_text("of a run of calibrate")
    given = ["-s", inputs.statistics] if command == "prune" else ["-p", inputs.plan, "--in-memory"]
    interrupted_after(monkeypatch, *MOMENTS["loading"])
    result = run(command, "-m", inputs.model, "-o", tmp_path / "out", *given)
    assert result.status == 130 and "interrupted; nothing half-written was left behind" in result.error


@pytest.mark.slow
def test_signals_while_writing(run, inputs, tmp_path):
    processes = {}
    for number in (signal.SIGINT, signal.SIGKILL):
        output = tmp_path / number.name / "out"
        before = old_output(output)
        arguments = ["heapr", "prune", *arguments_of(inputs, output)]
        processes[number] = start_python(STALLED, *arguments, has="package")
    try:
        for number, process in processes.items():
            assert process.wait_for_line("written"), process.communicate()
            os.kill(process.pid, number)
        for number, process in processes.items():
            _, error = process.communicate()
            folder = tmp_path / number.name
            assert listing(folder / "out") == before
            if number == signal.SIGINT:
                assert process.returncode == 130 and error.count("\n") == 1 and "interrupted" in error
                assert [path.name for path in folder.iterdir()] == ["out"]
            else:
                assert process.returncode == -number
                # What nobody could clean up is hidden and says what it is, and the next run removes it.
                assert all(path.name.startswith(".out.") for path in folder.iterdir() if path.name != "out")
                assert run("prune", *arguments_of(inputs, folder / "out")).status == 0
                assert [path.name for path in folder.iterdir()] == ["out"]
    finally:
        for process in processes.values():
            process.kill()
