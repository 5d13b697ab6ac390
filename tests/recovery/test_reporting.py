# Licensed under the Apache License, Version 2.0
"""Losses that are reported elsewhere while a training runs, through the integrations of the `Trainer`."""

import copy
from pathlib import Path

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from optimum_heapr import HeaprError, RecoveryConfig
from optimum_heapr.recovery import reporting
from optimum_heapr.recovery.reporting import check_reporting, reporting_callbacks
from tests.recovery.conftest import run


class Recorder(TrainerCallback):
    """Like the integrations of transformers: sends all that it is given."""

    sent: list = []

    def setup(self, args, state, model, **kwargs):
        self.sent.append({**args.to_dict(), "model": vars(model).keys(), "parameters": model.num_parameters()})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.setup(args, state, model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append({"step": state.global_step, **logs})


@pytest.fixture
def sent(monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Recorder)
    monkeypatch.setattr(Recorder, "sent", [])
    return Recorder.sent


def test_losses_are_reported_and_no_path_with_them(sent, pruned, tmp_path):
    recovery = run(
        copy.deepcopy(pruned.model), tmp_path / "run", report_to="trackio", dataset=str(tmp_path / "rows.jsonl")
    )
    first, *logs = sent
    assert first["rank"] == 4 and first["dataset"] == "rows.jsonl" and first["parameters"] > 0
    assert str(tmp_path) not in repr(sent) and list(first["model"]) == ["num_parameters"]
    measured = [{"step": entry["step"], "loss": entry["eval_held_out_loss"]} for entry in logs if "eval_loss" in entry]
    assert measured == recovery.report.history and any("grad_norm" in entry for entry in logs)


def test_nothing_is_reported_by_default(sent, pruned, tmp_path):
    run(copy.deepcopy(pruned.model), tmp_path / "run", max_steps=1, eval_steps=1)
    assert not sent


def test_what_is_not_installed_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(reporting, "find_spec", lambda name: None)
    with pytest.raises(HeaprError, match="report_to='wandb': is not installed; pip install wandb"):
        check_reporting(RecoveryConfig(report_to="wandb"))
    check_reporting(RecoveryConfig())
    with pytest.raises(HeaprError, match="report_to='wandd': must be one of trackio, .*; did you mean \"wandb\"?"):
        RecoveryConfig(report_to="wandd")


def test_what_is_elsewhere_does_not_tell_runs_apart(sent, pruned, tmp_path):
    """A run that was interrupted goes on without it, or with it."""
    run(copy.deepcopy(pruned.model), tmp_path / "run", max_steps=2, eval_steps=1)
    run(copy.deepcopy(pruned.model), tmp_path / "run", max_steps=2, eval_steps=1, resume=True, report_to="trackio")


def test_files_of_tensorboard_do_not_go_with_the_folder_of_the_run(monkeypatch):
    class Writer(TrainerCallback):
        logging_dir = None

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Writer)
    config = RecoveryConfig(report_to="tensorboard")
    [callback] = reporting_callbacks(config)
    assert callback.logging_dir.startswith(f"{reporting.TENSORBOARD_FOLDER}/")
    monkeypatch.setattr(Writer, "logging_dir", "elsewhere")
    assert reporting_callbacks(config)[0].logging_dir == "elsewhere", "as its variable of the environment says"


def test_tensorboard_writes_where_its_files_stay(pruned, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    run(copy.deepcopy(pruned.model), tmp_path / "run", report_to="tensorboard", max_steps=2, eval_steps=1)
    assert list(Path(reporting.TENSORBOARD_FOLDER).rglob("events.out.tfevents.*"))
