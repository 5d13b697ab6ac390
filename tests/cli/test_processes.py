# Licensed under the Apache License, Version 2.0
"""The command line under a launcher: the result does not depend on the number of processes, and no process waits for ever
for one that died."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from optimum_heapr import AtomicStatistics, HeaprConfig, PruningPlan
from optimum_heapr.utils.companions import STATISTICS_NAME, own_file
from tests.helpers import SUMS
from tests.processes import OPTIMUM_CLI, environment, free_port, in_two_processes, launched, run_python


pytestmark = pytest.mark.slow

# Rank 1 ends in its second micro-batch, or is stopped by an error that only it has.
DIES = """
import os, sys, signal
from optimum_heapr.calibration import runner
from optimum.commands.optimum_cli import main

measure, calls = runner._Measuring._measure, []

def dies(*arguments, **options):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        if os.environ["HOW"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.0, 1, "loss=nan"
    return measure(*arguments, **options)

runner._Measuring._measure = dies
main()
"""


# Rank 0 cannot write its output.
DISK_IS_FULL = """
import os
from optimum_heapr import AtomicStatistics
from optimum.commands.optimum_cli import main

def full(self, path, **options):
    raise OSError(28, "No space left on device")

AtomicStatistics.save = full
main()
"""


def launch(launcher, *arguments, **variables):
    """The module of a launcher, and the processes that it starts."""
    code = "import runpy, sys\ndel sys.argv[0]\nrunpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    return run_python(code, launcher, *arguments, env=launched(**variables), has="libraries", timeout=250)


def accelerate(processes, *arguments):
    """`accelerate launch` of several processes on CPUs; the flag --cpu would start one, see below."""
    flags = ["--multi_gpu", f"--num_processes={processes}", "--num_machines=1", "--mixed_precision=no"]
    flags += ["--dynamo_backend=no", f"--main_process_port={free_port()}", "--module", "optimum.commands.optimum_cli"]
    return launch("accelerate.commands.launch", *flags, *arguments)


def assert_as_one_process_measures(output, inputs):
    actual, expected = AtomicStatistics.load(output), AtomicStatistics.load(inputs.statistics)
    assert actual.fingerprint["loss"] == pytest.approx(expected.fingerprint["loss"], rel=1e-6)
    assert {**actual.fingerprint, "loss": 0} == {**expected.fingerprint, "loss": 0}
    for path, block in expected.blocks.items():
        assert torch.equal(actual.blocks[path].token_count, block.token_count)
        for name in (*SUMS, "output_norm_sum", "weight_norm"):
            torch.testing.assert_close(getattr(actual.blocks[path], name), getattr(block, name), rtol=1e-6, atol=0)
    config = HeaprConfig(ratio=0.4)
    assert_same_kept(*(PruningPlan.build(statistics, config) for statistics in (actual, expected)))


def assert_same_kept(actual, expected):
    for path, experts in expected.kept.items():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(actual.kept[path], experts, strict=True))


# Of one process, two and three: the next three tests.
def test_three_processes_measure_what_one_does(inputs, tmp_path):
    output = tmp_path / "statistics"
    flags = ["-m", inputs.model, "-o", output, *inputs.calibration, "--statistics", "gram", "--save-every", 2]
    result = accelerate(3, "heapr", "calibrate", *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Statistics written to") == result.stdout.count("nats a token") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["statistics"]
    assert_as_one_process_measures(output, inputs)


def test_two_processes_prune_as_one_and_write_once(inputs, tmp_path):
    results = in_two_processes(
        OPTIMUM_CLI, "heapr", "prune", "-m", inputs.model, "-o", tmp_path / "out", *inputs.calibration
    )
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    assert [result.stdout.count("Pruned model written to") for result in results] == [1, 0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(os.listdir(inputs.pruned))
    assert_same_kept(PruningPlan.load(tmp_path / "out"), PruningPlan.load(inputs.plan))


def test_two_processes_with_parts_of_the_weights_prune_as_one(inputs, tmp_path):
    """The first process cuts the checkpoint, which no process has whole."""
    results = in_two_processes(
        OPTIMUM_CLI,
        "heapr",
        "prune",
        "-m",
        inputs.model,
        "-o",
        tmp_path / "out",
        *inputs.calibration,
        "--tp-plan",
        "auto",
    )
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    assert [result.stdout.count("Pruned model written to") for result in results] == [1, 0]
    assert_same_kept(PruningPlan.load(tmp_path / "out"), PruningPlan.load(inputs.plan))
    actual, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", inputs.pruned))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_accelerate_with_the_flag_for_cpus_starts_one_process(inputs, tmp_path):
    """A flag of accelerate, not ours; should it ever start two, the guide and the warning are to be changed. Each process is new."""
    output = tmp_path / "statistics"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
    command = [*launcher, "--module", "optimum.commands.optimum_cli", "heapr", "calibrate", "-m", inputs.model]
    command += ["-o", output, *inputs.calibration]
    result = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=250)
    assert result.returncode == 0 and output.exists(), result.stderr
    assert result.stderr.count("asked for several processes but started one, which does all the work") == 1
    assert_as_one_process_measures(output, inputs)


@pytest.mark.parametrize("command", ["calibrate", "prune"])
def test_a_launcher_that_shards_is_refused_before_anything_is_loaded(command, run, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    result = run(command, "-m", tmp_path / "nothing here", "--dataset", "demo", "-o", tmp_path / "out")
    assert result.status == 2
    assert "error: launcher: accelerate uses FSDP (ACCELERATE_USE_FSDP)" in result.error


@pytest.mark.parametrize(
    ("how", "launcher"), [("kill", True), ("kill", False), ("error", False)], ids=["torchrun", "kill", "error"]
)
def test_a_process_that_dies_ends_the_run(how, launcher, inputs, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    arguments = [
        "heapr",
        "calibrate",
        "-m",
        inputs.model,
        "-o",
        tmp_path / "out",
        *inputs.calibration,
        "--save-every",
        1,
    ]
    arguments = list(map(str, arguments))
    began = time.monotonic()
    if launcher:
        flags = ["--nproc-per-node=2", f"--master-port={free_port()}"]
        result = launch("torch.distributed.run", *flags, script, *arguments, HOW=how)
        status, error = [result.returncode], result.stderr
    else:
        results = in_two_processes(DIES, *arguments, HOW=how)
        status, errors = ([getattr(result, part) for result in results] for part in ("returncode", "stderr"))
        error = errors[0]
        assert status[1] == (-signal.SIGKILL if how == "kill" else 2)
        # As a rule the other process is told; now and then gloo aborts it from a thread of its own before that.
        assert status[0] in (2, -signal.SIGABRT)
        if status[0] == 2:
            assert "processes: another one ended before the sums could be added" in error
        error = "".join(errors)
    assert all(status) and time.monotonic() - began < 120
    if how == "error":
        assert "loss nan: not finite in micro-batch 3 (samples [3])" in error
    assert not (tmp_path / "out").exists()

    # The shares that were saved go on; only what is missing is measured.
    assert (tmp_path / "out.state").exists() and (tmp_path / "out.state.1").exists()
    resumed = in_two_processes(OPTIMUM_CLI, *arguments, "--resume")
    assert [process.returncode for process in resumed] == [0, 0], [process.stderr for process in resumed]
    expected = AtomicStatistics.load(inputs.statistics)
    for path, block in AtomicStatistics.load(tmp_path / "out").blocks.items():
        torch.testing.assert_close(block.fisher_sum, expected.blocks[path].fisher_sum, rtol=1e-5, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dies.py", "out"]


# The second process has no such model: on a host of its own, say.
NOT_FOUND = """
import os, sys
from optimum.commands.optimum_cli import main

if os.environ["RANK"] == "1":
    sys.argv[sys.argv.index("-m") + 1] = "/not/here"
main()
"""


@pytest.mark.parametrize("command", ["calibrate", "prune"])
def test_a_process_that_ends_before_it_measures_ends_the_run(command, inputs, tmp_path):
    """Whoever is not connected by then would be waited for, for a day."""
    arguments = ["heapr", command, "-m", inputs.model, "-o", tmp_path / "out", *inputs.calibration]
    first, second = in_two_processes(NOT_FOUND, *map(str, arguments))
    assert second.returncode == 2 and "no such folder" in second.stderr
    assert first.returncode in (2, -signal.SIGABRT)
    if first.returncode == 2:
        assert "processes: another one ended before" in first.stderr


@pytest.mark.parametrize(("command", "memory"), [("calibrate", "streaming"), ("prune", "plain")])
def test_states_stay_until_the_output_is_safe(command, memory, inputs, tmp_path):
    """The second process has nothing to write, and yet its state is needed until the first one has written."""
    arguments = ["heapr", command, "-m", inputs.model, "-o", tmp_path / "out", *inputs.calibration]
    arguments += ["--memory", memory, "--save-every", 1, "--resume"]
    arguments = [*map(str, arguments), *(["--eval-samples", "0"] if command == "prune" else [])]
    full = in_two_processes(DISK_IS_FULL, *arguments)
    assert full[0].returncode == 1 and "No space left" in full[0].stderr
    assert full[1].returncode in (2, -signal.SIGABRT)
    if full[1].returncode == 2:
        assert "processes: another one ended before its output was written" in full[1].stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.state", "out.state.1"]

    resumed = in_two_processes(OPTIMUM_CLI, *arguments)
    assert [process.returncode for process in resumed] == [0, 0], [process.stderr for process in resumed]
    assert all("Going on after" in process.stderr for process in resumed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    written = tmp_path / "out" if command == "calibrate" else own_file(tmp_path / "out", STATISTICS_NAME)
    expected = AtomicStatistics.load(inputs.statistics)
    for path, block in AtomicStatistics.load(written).blocks.items():
        assert torch.equal(block.token_count, expected.blocks[path].token_count)
        torch.testing.assert_close(block.fisher_sum, expected.blocks[path].fisher_sum, rtol=1e-5, atol=0)


# Rank 1 ends where it is to fit its second block.
DIES_FITTING = """
import os, signal
from optimum_heapr.surgery import layer_by_layer
from optimum.commands.optimum_cli import main

fitted, blocks = layer_by_layer._fitted, []

def dies(model, block, *arguments):
    blocks.append(block.path)
    if os.environ["RANK"] == "1" and len(blocks) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return fitted(model, block, *arguments)

layer_by_layer._fitted = dies
main()
"""


def test_blocks_are_fitted_by_all_processes_and_fits_outlive_one_that_dies(run, inputs, tmp_path):
    """`prune` in memory, of which one process dies, and goes on; then `apply` from the checkpoint. Both as one process does."""
    over_blocks = ["--compensate", "--compensation-scope", "block", "--reconstruction-steps", "3"]
    measured = ["-m", inputs.model, *inputs.calibration, "-s", inputs.statistics, *over_blocks, "--eval-samples", "0"]
    assert run("prune", *measured, "-o", tmp_path / "expected").status == 0
    prune = ["heapr", "prune", *measured, "-o", tmp_path / "out", "--resume"]
    first, second = in_two_processes(DIES_FITTING, *prune)
    assert second.returncode == -signal.SIGKILL and first.returncode in (2, -signal.SIGABRT), first.stderr
    if first.returncode == 2:
        assert "error: processes: another one ended before the sums could be added" in first.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "out.fits").iterdir())) == 1

    apply = ["heapr", "apply", "-m", inputs.model, *inputs.calibration, "-p", tmp_path / "expected"]
    apply += ["-o", tmp_path / "applied"]
    for command, output in ((prune, "out"), (apply, "applied")):
        results = in_two_processes(OPTIMUM_CLI, *command)
        assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
        assert [result.stdout.count("Pruned model written to") for result in results] == [1, 0]
        found, expected = (load_file(tmp_path / name / "model.safetensors") for name in (output, "expected"))
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["applied", "expected", "out"]
