# Licensed under the Apache License, Version 2.0
"""Blocks that were fitted before a run was killed are not fitted again, and the result is that of a run that was not."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.checkpoints.saving import apply_streaming
from optimum_heapr.surgery import fit_files, layer_by_layer
from optimum_heapr.surgery.fit_files import remove_fits
from optimum_heapr.utils.artefacts import read_artefact
from tests.helpers import calibration_data, tiny_model


OPTIONS = {"ratio": 0.5, "compensate": True, "compensation_scope": "block", "batch_size": 8, "reconstruction_steps": 4}


class Killed(BaseException):
    """No error that anything may catch."""


@pytest.fixture(scope="module", params=[("qwen2_moe", torch.float32), ("gpt_oss", torch.bfloat16)])
def measured(request):
    """A model (with a shared expert, or biases), text and statistics. Not to be changed."""
    model, data = tiny_model(request.param[0], dtype=request.param[1]), calibration_data(*[24] * 40)
    return model, data, calibrate(model, data, 8)


def applied(measured, folder, **changes):
    """The weights of the pruned model, and its plan."""
    model, data, statistics = measured
    pruner = HeaprPruner(copy.deepcopy(model), config=HeaprConfig(**{**OPTIONS, **changes}))
    pruner.statistics, pruner.calibration_data = statistics, data
    return pruner.apply(pruner.plan(), fits_path=folder).state_dict(), pruner.applied_plan


@pytest.fixture
def fits_until(monkeypatch):
    """Kills a run when it comes to the block of this number; `None` lets it go on. Lists the blocks that are fitted."""
    fitted, plain = [], layer_by_layer._fitted

    def until(number):
        def fit(model, block, *arguments):
            if number is not None and len(fitted) == number:
                raise Killed
            fitted.append(block.path)
            return plain(model, block, *arguments)

        fitted.clear()
        monkeypatch.setattr(layer_by_layer, "_fitted", fit)
        return fitted

    return until


@pytest.mark.parametrize("steps", [0, 4])
def test_what_was_fitted_is_taken_over(measured, steps, tmp_path, fits_until):
    expected, plan = applied(measured, None, reconstruction_steps=steps)
    fits_until(1)
    with pytest.raises(Killed):
        applied(measured, tmp_path / "fits", reconstruction_steps=steps)
    fitted = fits_until(None)
    found, resumed = applied(measured, tmp_path / "fits", reconstruction_steps=steps)
    assert fitted == list(plan.kept)[1:]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert resumed == plan and bool(plan.reconstruction) == bool(steps)
    (tmp_path / "fits" / "notes.txt").write_text("mine")
    remove_fits(tmp_path / "fits")
    assert [entry.name for entry in (tmp_path / "fits").iterdir()] == ["notes.txt"]


def test_a_folder_for_fits_of_a_plan_without_any_is_said_to_have_no_use(tmp_path, heapr_log):
    model, data = tiny_model("qwen2_moe"), calibration_data(*[24] * 4)
    model.save_pretrained(tmp_path / "model")
    plan = PruningPlan.build(calibrate(model, data), HeaprConfig(ratio=0.5))
    fits = str(tmp_path / "fits of nothing")
    HeaprPruner(model).apply(plan, fits_path=fits)
    assert heapr_log.messages[-1] == f"fits_path={fits!r}: has no use, as the plan does not compensate over blocks"
    apply_streaming(tmp_path / "model", plan, tmp_path / "pruned", fits_path=fits + " of files")
    assert heapr_log.messages[-1].startswith(f"fits_path={fits + ' of files'!r}: has no use")
    assert (tmp_path / "pruned" / "config.json").exists()


def test_file_by_file_too(tmp_path, fits_until):
    model, data = tiny_model("qwen2_moe"), calibration_data(*[24] * 40)
    model.save_pretrained(tmp_path / "model")
    pruner = HeaprPruner.from_pretrained(tmp_path / "model", HeaprConfig(**OPTIONS), memory="streaming")
    pruner.statistics, pruner.calibration_data = calibrate(model, data, 8), data
    plan, fits = pruner.plan(), tmp_path / "fits"
    pruner.apply(plan)
    pruner.save_pretrained(tmp_path / "expected")
    fits_until(1)
    with pytest.raises(Killed):
        pruner.apply(plan, fits_path=fits)
    assert len(list(fits.iterdir())) == 1
    fitted = fits_until(None)
    pruner.apply(plan, fits_path=fits)
    assert len(list(fits.iterdir())) == 2
    pruner.save_pretrained(tmp_path / "pruned")
    assert not fits.exists(), "the output is safe"
    plan.config = plan.config.replace(compensate=False, compensation_scope="expert", reconstruction_steps=0)
    pruner.apply(plan)
    pruner.save_pretrained(tmp_path / "plain")
    assert plan.compensation == plan.reconstruction == {}
    assert fitted == list(plan.kept)[1:]
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "pruned"))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def _without_rows(tensors, document):
    return tensors, {name: part for name, part in document.items() if name != "rows"}


def _of_an_earlier_version(tensors, document):
    return tensors, {**document, "run": {name: part for name, part in document["run"].items() if name != "trained_in"}}


def _of_another_shape(name, change):
    """An artefact whose first tensor of such a name has another shape."""

    def changed(tensors, document):
        chosen = next(key for key in tensors if name in key)
        return {**tensors, chosen: change(tensors[chosen])}, document

    return changed


def test_rows_of_another_shape_are_refused(measured, tmp_path, monkeypatch):
    """Those that would be broadcast as well."""
    applied(measured, tmp_path / "fits")
    keys = list(load_file(min((tmp_path / "fits").iterdir())))
    changes = {
        "down_proj.1": lambda rows: rows[:1],
        "gate_up_proj.0": lambda rows: rows[0],
        "shared.": lambda part: part[:, :1],
    }
    changes = {name: change for name, change in changes.items() if any(name in key for key in keys)}
    assert len(changes) > 1
    for name, change in changes.items():
        with pytest.raises(
            HeaprError,
            match=r"^fits='[^']*fits': is damaged \(.* has shape \[.*\] and must have \[.*\]\); delete the folder",
        ):
            with monkeypatch.context() as patch:
                spoil = _of_another_shape(name, change)
                patch.setattr(fit_files, "read_artefact", lambda *given, spoil=spoil: spoil(*read_artefact(*given)))
                applied(measured, tmp_path / "fits")
    shutil.rmtree(tmp_path / "fits")


def test_what_another_run_left_is_refused(measured, tmp_path, monkeypatch):
    applied(measured, tmp_path / "fits")
    differ = r"^fits='[^']*fits': saved by a run that differs \({}.*\); go on with the same plan, text and options, or delete"
    with pytest.raises(HeaprError, match=differ.format("reconstruction_steps was 4, is 5")):
        applied(measured, tmp_path / "fits", reconstruction_steps=5)
    with pytest.raises(HeaprError, match=differ.format("kept was ")):
        applied(measured, tmp_path / "fits", ratio=0.25)
    model, _, statistics = measured
    with pytest.raises(HeaprError, match=differ.format(r"data.num_samples was 40, is 39; data.num_tokens was")):
        applied((model, calibration_data(*[24] * 39), statistics), tmp_path / "fits")
    with pytest.raises(HeaprError, match=r"^fits='[^']*fits': is damaged \(it has no 'rows'\); delete the folder"):
        with monkeypatch.context() as patch:
            patch.setattr(fit_files, "read_artefact", lambda *given: _without_rows(*read_artefact(*given)))
            applied(measured, tmp_path / "fits")
    # Which trained blocks in another way: half of a model would be of each.
    monkeypatch.setattr(fit_files, "read_artefact", lambda *given: _of_an_earlier_version(*read_artefact(*given)))
    with pytest.raises(HeaprError, match=differ.format('trained_in was null, is "both models"')):
        applied(measured, tmp_path / "fits")
    monkeypatch.undo()
    for file in (tmp_path / "fits").iterdir():
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(HeaprError, match="fit='.*': truncated or not a safetensors file"):
        applied(measured, tmp_path / "fits")
    shutil.rmtree(tmp_path / "fits")


def test_what_an_earlier_version_fitted_without_training_is_taken_over(measured, tmp_path, monkeypatch):
    expected, _ = applied(measured, tmp_path / "fits", reconstruction_steps=0)
    monkeypatch.setattr(fit_files, "read_artefact", lambda *given: _of_an_earlier_version(*read_artefact(*given)))
    found, _ = applied(measured, tmp_path / "fits", reconstruction_steps=0)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_where_no_folder_can_be_is_refused(measured, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            HeaprError, match=r"^fits='[^']*file[^']*': cannot be made a folder \(.*\); name another place"
        ):
            applied(measured, place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_plan_says_what_was_done_last(measured):
    """That of a pruned model holds what was done then: with less text there is nothing to train by."""
    model, data, statistics = measured
    _, plan = applied(measured, None)
    assert plan.reconstruction
    pruner = HeaprPruner(copy.deepcopy(model))
    pruner.calibration_data = calibration_data(7)
    pruner.apply(plan)
    assert plan.reconstruction == {} and set(plan.compensation) == set(plan.kept)
    plan.config = plan.config.replace(compensate=False, compensation_scope="expert", reconstruction_steps=0)
    HeaprPruner(copy.deepcopy(model)).apply(plan)
    assert plan.compensation == {}


def test_from_a_plan_file_too(tmp_path, fits_until):
    model, data = tiny_model(), calibration_data(*[24] * 8)
    model.save_pretrained(tmp_path / "model")
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": [sample.tolist() for sample in data.samples]})
    rows.to_json(tmp_path / "text.jsonl")
    config = HeaprConfig(**{**OPTIONS, "dataset": str(tmp_path / "text.jsonl"), "num_samples": 8, "seq_length": 24})
    pruner = HeaprPruner.from_pretrained(tmp_path / "model", config)
    pruner.calibrate()
    pruner.plan().save(tmp_path / "plan.safetensors")
    arguments = tmp_path / "model", tmp_path / "plan.safetensors", tmp_path / "out"
    fits_until(1)
    with pytest.raises(Killed):
        apply_streaming(*arguments, fits_path=str(tmp_path / "fits"))
    fitted = fits_until(None)
    apply_streaming(*arguments, fits_path=str(tmp_path / "fits"))
    assert len(fitted) == 1 and (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "fits").exists()
