# Licensed under the Apache License, Version 2.0
"""Runs that are interrupted and go on: the statistics are, bit for bit, those of an unbroken run."""

import os
import signal

import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner
from optimum_heapr.calibration.layer_state import StateFolder
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.calibration.state import Progress, StateFile
from optimum_heapr.calibration.statistics import AtomicStatistics
from optimum_heapr.text.samples import CalibrationData
from tests.helpers import calibration_data, tiny_model


LENGTHS = (8, 5, 7, 8, 6)


def file_of(statistics, path):
    statistics.save(path)
    return path.read_bytes()


@pytest.fixture
def unbroken(tmp_path):
    return file_of(calibrate(tiny_model(), calibration_data(*LENGTHS)), tmp_path / "unbroken")


def stop_at(model, call, how):
    """Does `how` in the middle of a forward: the one of this number."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == call:
            how()

    return model.model.layers[1].mlp.experts.register_forward_hook(hook)


def fail():
    raise RuntimeError("power cut")


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("save_every", [1, 2])
def test_a_run_that_dies_goes_on(call, save_every, tmp_path, unbroken):
    model, data, path = tiny_model(), calibration_data(*LENGTHS), tmp_path / "state"
    handle = stop_at(model, call, fail)
    with pytest.raises(RuntimeError, match="power cut"):
        calibrate(model, data, state=StateFile(path, save_every=save_every))
    handle.remove()
    assert path.exists() == (call > save_every)
    calls = []
    model.model.layers[1].mlp.experts.register_forward_hook(lambda *_: calls.append(1))
    statistics = calibrate(model, data, state=StateFile(path, resume=True))
    assert len(calls) == 5 - (call - 1) // save_every * save_every, "what was done is not done again"
    assert file_of(statistics, tmp_path / "resumed") == unbroken


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_micro_batch_save_and_stop(number, tmp_path, unbroken):
    model, data, path = tiny_model(), calibration_data(*LENGTHS), tmp_path / "state"
    handle = stop_at(model, 3, lambda: os.kill(os.getpid(), number))
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stopped:
        calibrate(model, data, state=StateFile(path))
    assert number == signal.SIGINT or stopped.value.code == 143
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    handle.remove()
    calls = []
    model.model.layers[1].mlp.experts.register_forward_hook(lambda *_: calls.append(1))
    assert file_of(calibrate(model, data, state=StateFile(path, resume=True)), tmp_path / "x") == unbroken
    assert len(calls) == 2


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    model = tiny_model()
    stop_at(model, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, calibration_data(*LENGTHS), state=StateFile(tmp_path / "state"))
    assert not (tmp_path / "state").exists(), "the micro-batch was not over"


def test_ctrl_c_while_the_last_state_is_written(tmp_path, monkeypatch, unbroken):
    save = StateFile.save

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        save(self, *arguments)

    data = calibration_data(*LENGTHS)
    monkeypatch.setattr(StateFile, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_model(), data, state=StateFile(tmp_path / "state"))
    monkeypatch.undo()
    assert (
        file_of(calibrate(tiny_model(), data, state=StateFile(tmp_path / "state", True)), tmp_path / "x") == unbroken
    )


def test_second_order_statistics_and_what_was_left_out_go_on(tmp_path):
    data = calibration_data(*LENGTHS)
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    samples = [torch.where(sample == 7, 8, sample) for sample in data.samples]
    samples[1][2] = samples[4][2] = 7
    data = CalibrationData(samples, "x", 0, 8)
    expected = calibrate(model, data, gram=True, skip_nonfinite=True)
    assert expected.fingerprint["skipped"] == [1, 4]
    handle = stop_at(model, 4, fail)
    with pytest.raises(RuntimeError):
        calibrate(model, data, gram=True, skip_nonfinite=True, state=StateFile(tmp_path / "s", save_every=1))
    handle.remove()
    actual = calibrate(model, data, gram=True, skip_nonfinite=True, state=StateFile(tmp_path / "s", True))
    assert file_of(actual, tmp_path / "a") == file_of(expected, tmp_path / "b")


# What is refused


def interrupted_run(path, model=None, data=None, **options):
    model = model or tiny_model()
    handle = stop_at(model, 3, fail)
    with pytest.raises(RuntimeError):
        calibrate(model, data or calibration_data(*LENGTHS), state=StateFile(path, save_every=1), **options)
    handle.remove()


def test_another_run_is_refused_naming_what_differs(tmp_path):
    path = tmp_path / "state"
    interrupted_run(path)

    def refused(match, model=None, data=None, **options):
        content = path.read_bytes()
        with pytest.raises(HeaprError, match=match) as error:
            calibrate(
                model or tiny_model(), data or calibration_data(*LENGTHS), state=StateFile(path, True), **options
            )
        assert "delete the file to begin anew" in str(error.value)
        assert path.read_bytes() == content

    refused(r"differs \(model\.experts was \"[\w:]+\", is \"[\w:]+\"; model\.weights was", tiny_model(seed=1))
    refused(r"model\.dtype was \"torch.float32\", is \"torch.bfloat16\"", tiny_model(dtype=torch.bfloat16))
    refused(r"model\.model_type was \"qwen3_moe\", is \"mixtral\"", tiny_model("mixtral"))
    other = calibration_data(*LENGTHS)
    other.samples[4][0] += 1
    refused(r"differs \(data\.sha256 was \"\w+\", is \"\w+\"\); resume with the same", data=other)
    refused(r"seed was 0, is 1", data=CalibrationData(calibration_data(*LENGTHS).samples, "random tokens", 1, 8))
    refused(r"differs \(batch_size was 1, is 2\)", batch_size=2)
    refused(r"differs \(statistics was \"vector\", is \"gram\"\)", gram=True)
    refused(r"differs \(skip_nonfinite was false, is true\)", skip_nonfinite=True)


def test_another_number_of_processes_is_refused(tmp_path):
    first, again = StateFile(tmp_path / "state"), StateFile(tmp_path / "state", resume=True)
    first.begin({"processes": 2}, {})
    first.save(Progress(), {})
    with pytest.raises(HeaprError, match=r"differs \(processes was 2, is 1\)"):
        again.begin({"processes": 1}, {})


def test_each_process_has_its_own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    assert StateFile(tmp_path / "state").path == tmp_path / "state.2"
    monkeypatch.setenv("RANK", "0")
    assert StateFile(tmp_path / "state").path == tmp_path / "state"


def test_a_state_that_is_there_needs_a_word(tmp_path):
    (tmp_path / "state").write_bytes(b"")
    with pytest.raises(HeaprError, match=r"a calibration was interrupted here; pass resume=True to go on"):
        StateFile(tmp_path / "state")


def test_a_damaged_state_is_refused(tmp_path):
    path = tmp_path / "state"
    interrupted_run(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(HeaprError, match="truncated or not a safetensors file"):
        calibrate(tiny_model(), calibration_data(*LENGTHS), state=StateFile(path, True))


def test_a_state_is_no_statistics_file(tmp_path):
    """Half a calibration must not be planned with by mistake."""
    interrupted_run(tmp_path / "state")
    with pytest.raises(HeaprError, match="holds 'heapr_calibration_state' data, not 'heapr_statistics'"):
        AtomicStatistics.load(tmp_path / "state")


def test_wrong_options_are_refused(tmp_path):
    for state_class in (StateFile, StateFolder):
        with pytest.raises(HeaprError, match="save_every=-1: must be at least 0"):
            state_class(tmp_path / "state", save_every=-1)
    pruner = HeaprPruner(tiny_model())
    for options in ({"resume": True}, {"save_every": 3}):
        with pytest.raises(HeaprError, match="state_path=None: .* need a file; name one"):
            pruner.calibrate(**options)


# The facade


def test_the_state_is_removed_at_the_end(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict(
        {"input_ids": [sample.tolist() for sample in calibration_data(*LENGTHS).samples]}
    )
    pruner = HeaprPruner(tiny_model(), config=HeaprConfig(num_samples=5, seq_length=8))
    handle = stop_at(pruner.model, 3, fail)
    with pytest.raises(RuntimeError):
        pruner.calibrate(rows, state_path=tmp_path / "state", save_every=1)
    handle.remove()
    assert (tmp_path / "state").exists()
    first = pruner.calibrate(rows, state_path=tmp_path / "state", resume=True)
    assert not list(tmp_path.iterdir())
    second = pruner.calibrate(rows, state_path=tmp_path / "state", resume=True)  # nothing to go on from
    assert file_of(first, tmp_path / "a") == file_of(second, tmp_path / "b")
    pruner.calibrate(rows, state_path=tmp_path / "state", keep_state=True)
    assert (tmp_path / "state").exists()
