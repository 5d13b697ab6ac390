# Licensed under the Apache License, Version 2.0
"""Compensation over blocks and reconstruction by several processes: what one process makes, on each of them."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.surgery import layer_by_layer, reconstruction
from optimum_heapr.surgery.portion import Portion
from tests.helpers import calibration_data, tiny_model
from tests.ranks import Ranks


OPTIONS = {"ratio": 0.5, "compensate": True, "compensation_scope": "block", "batch_size": 4}
TRAINED = {**OPTIONS, "reconstruction_steps": 6, "reconstruction_learning_rate": 1e-3}
FEWER = {**OPTIONS, "layout": "uniform", "num_experts": "auto", "width_multiple": 4}


@pytest.fixture(scope="module")
def measured():
    """By model type, a model, text of uneven samples, and its statistics. Not to be changed."""
    found = {}

    def of(model_type, dtype=torch.float64):
        if (model_type, dtype) not in found:
            model, data = tiny_model(model_type, dtype=dtype), calibration_data(*(24, 30, 7) * 12)
            found[model_type, dtype] = model, data, calibrate(model, data, 12)
        return found[model_type, dtype]

    return of


def prune(measured, options, **given):
    model, data, statistics = measured
    pruner = HeaprPruner(copy.deepcopy(model), config=HeaprConfig(**options))
    pruner.statistics, pruner.calibration_data = statistics, data
    plan = pruner.plan()
    return pruner.apply(plan, **given).state_dict(), plan


def assert_same(found, plan, expected, planned):
    """Weights and errors, up to rounding."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        rtol, atol = {torch.float64: (1e-8, 1e-10), torch.float32: (1e-3, 1e-5)}[weight.dtype]
        torch.testing.assert_close(found[name], weight, rtol=rtol, atol=atol)
    assert plan.compensation.keys() == planned.compensation.keys()
    for path, pairs in planned.compensation.items():
        torch.testing.assert_close(torch.tensor(plan.compensation[path]), torch.tensor(pairs))
    assert plan.reconstruction.keys() == planned.reconstruction.keys()
    for path, done in planned.reconstruction.items():
        errors = {name: value for name, value in done.items() if name != "kept"}
        assert plan.reconstruction[path] == {"kept": done["kept"], **{n: pytest.approx(v) for n, v in errors.items()}}


@pytest.mark.parametrize(
    ("model_type", "options", "number"),
    [("qwen3_moe", OPTIONS, 2), ("qwen2_moe", TRAINED, 3), ("gpt_oss", TRAINED, 2), ("qwen3_moe", FEWER, 2)],
)
def test_several_processes_make_what_one_does(measured, model_type, options, number, monkeypatch):
    """Nine micro-batches of 244 tokens; all processes have the same bits."""
    expected = prune(measured(model_type), options)
    ranks = Ranks(monkeypatch, number)
    (first, plan), *others = ranks.run(lambda rank: prune(measured(model_type), options))
    assert_same(first, plan, *expected)
    for found, other in others:
        assert all(torch.equal(found[name], weight) for name, weight in first.items())
        assert (other.compensation, other.reconstruction) == (plan.compensation, plan.reconstruction)
        assert other.rectangles == plan.rectangles
    assert ("trained" in {done["kept"] for done in plan.reconstruction.values()}) == (options is TRAINED)
    for one, other in zip(plan.rectangles, expected[1].rectangles, strict=True):
        assert one == {**other, "increase": pytest.approx(other["increase"])}
    assert len(plan.rectangles) > 1 or options is not FEWER


def test_compensation_within_experts_is_refused_in_each_process_before_anything_is_measured(monkeypatch):
    """Of several the first alone would have the matrices, and go on where the others could not."""
    ranks = Ranks(monkeypatch)

    def refused(rank):
        pruner = HeaprPruner(tiny_model(), config=HeaprConfig(compensate=True, eval_samples=0))
        pruner.calibrate = lambda *_, **__: pytest.fail("was measured")
        with pytest.raises(HeaprError) as error:
            pruner.prune()
        return str(error.value)

    message = "compensation_scope='expert': takes matrices, and of the 2 processes that call prune() the first alone would have them; call "
    for found in ranks.run(refused):
        assert found.startswith(message) and found.endswith("or ask for compensation_scope='block'")


@pytest.mark.parametrize("number", [1, 2, 3, 5, 7])
def test_each_token_is_in_one_portion(number, monkeypatch):
    """Five micro-batches; where there are more processes, some have none."""
    data, ranks = calibration_data(4, 7, 3, 9, 5, 2, 8, 6, 1), Ranks(monkeypatch, number)
    portions = ranks.run(lambda rank: Portion(data, 2, ranks))
    whole = Portion(data, 2)
    assert (whole.first, whole.here, whole.tokens) == (0, 45, 45)
    start = 0
    for portion in portions:
        assert (portion.first, portion.tokens) == (start, 45)
        assert sum(int(batch["counts"].sum()) for batch in portion.batches.values()) == portion.here
        assert portion.own(torch.tensor([44, 3, 20])).tolist() == [
            token - start for token in (44, 3, 20) if start <= token < start + portion.here
        ]
        start += portion.here
    assert start == 45


def test_a_process_without_a_micro_batch_helps_without_tokens(measured, monkeypatch):
    options = {**TRAINED, "batch_size": 20}
    expected = prune(measured("qwen2_moe"), options)
    ranks = Ranks(monkeypatch, 3)
    for found in ranks.run(lambda rank: prune(measured("qwen2_moe"), options)):
        assert_same(*found, *expected)


def test_from_the_checkpoint_too(measured, monkeypatch, tmp_path):
    """Of two processes each reads the layers; what the first writes is what one process writes. The type is the default one, which
    loading changes for all threads otherwise."""
    model, data, statistics = measured("qwen2_moe", torch.float32)
    model.save_pretrained(tmp_path / "model")

    def apply():
        pruner = HeaprPruner.from_pretrained(tmp_path / "model", HeaprConfig(**OPTIONS), memory="streaming")
        pruner.statistics, pruner.calibration_data = statistics, data
        pruner.apply(pruner.plan())
        return pruner

    alone = apply()
    alone.save_pretrained(tmp_path / "expected")
    ranks = Ranks(monkeypatch)
    first, second = ranks.run(lambda rank: apply())
    first.save_pretrained(tmp_path / "pruned")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "pruned"))
    assert_same(found, first.applied_plan, expected, alone.applied_plan)
    assert second.applied_plan.compensation == first.applied_plan.compensation


def test_what_was_fitted_before_is_taken_over_from_the_files_of_the_first(measured, monkeypatch, tmp_path):
    fits, fitted = tmp_path / "fits", []
    expected, planned = prune(measured("qwen2_moe"), TRAINED, fits_path=fits)
    paths = list(planned.kept)
    (fits / f"{paths[-1]}.fit.safetensors").unlink()
    fit = layer_by_layer._fitted

    def counted(model, block, *arguments):
        fitted.append(block.path)
        return fit(model, block, *arguments)

    monkeypatch.setattr(layer_by_layer, "_fitted", counted)
    ranks, given = Ranks(monkeypatch), [{"fits_path": fits}, {"fits_path": tmp_path / "of another host"}]
    results = ranks.run(lambda rank: prune(measured("qwen2_moe"), TRAINED, **given[rank]))
    for found in results:
        assert_same(*found, expected, planned)
    assert fitted == [paths[-1]] * 2 and not (tmp_path / "of another host").exists()
    assert len(list(fits.iterdir())) == len(paths)


def test_shared_experts_are_those_of_all_processes(measured, monkeypatch):
    """One whose output is not added on one of two processes is none."""
    from optimum_heapr.surgery.block_inputs import BlockInputs

    ranks, mlp = Ranks(monkeypatch), torch.nn.Identity()

    def agree(rank):
        inputs = BlockInputs({"one": mlp, "other": mlp})
        if rank == 1:
            del inputs.shared["one"]
        inputs.agree_on_shared(Portion(calibration_data(4, 4), 1, ranks).added)
        return list(inputs.shared)

    assert ranks.run(agree) == [["other"], ["other"]]


def test_processes_that_fit_other_plans_are_refused(measured, monkeypatch):
    ranks = Ranks(monkeypatch)
    with pytest.raises(HeaprError, match="processes: .* on rank 0 and .* on rank 1; start all of them with"):
        ranks.run(lambda rank: prune(measured("qwen3_moe"), {**OPTIONS, "ratio": [0.5, 0.25][rank]}))


def test_a_process_that_fails_ends_all(measured, monkeypatch):
    ranks, step = Ranks(monkeypatch), reconstruction.Student.output

    def fails(student, *tokens):
        if ranks.process_index == 1:
            raise HeaprError("out of memory")
        return step(student, *tokens)

    monkeypatch.setattr(reconstruction.Student, "output", fails)
    with pytest.raises(HeaprError, match="out of memory"):
        ranks.run(lambda rank: prune(measured("qwen3_moe"), TRAINED))
