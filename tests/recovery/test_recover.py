# Licensed under the Apache License, Version 2.0
"""Runs of recovery: what is kept, what it loads into, and that neither interruptions nor their number change it."""

import copy
import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from optimum_heapr import HeaprError
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.modeling import half_precision
from optimum_heapr.recovery import runner
from optimum_heapr.recovery import trainer as trainer_module
from optimum_heapr.recovery.adapter import load_adapter
from optimum_heapr.recovery.data import RecoveryData
from optimum_heapr.recovery.output import plan_of, save_adapter, save_merged
from optimum_heapr.recovery.state import RunFolder
from optimum_heapr.recovery.teacher import Teacher, held_out_loss
from optimum_heapr.recovery.trainer import RecoveryTrainer
from optimum_heapr.utils import logging
from tests.helpers import random_ids, tiny_model
from tests.recovery.conftest import DISTILLATION, ROWS, prune, quick, run


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=random_ids()).logits


def reload(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def adapter_weights(recovery):
    return {name: p.detach().clone() for name, p in recovery.model.named_parameters() if p.requires_grad}


def assert_close(first, second, **tolerance):
    torch.testing.assert_close(first, second, **{"rtol": 0, "atol": 1e-4, **tolerance})


@pytest.mark.parametrize("scope", ["expert", "block"])
def test_what_compensation_gave_is_measured(tmp_path, scope):
    pruner = prune("qwen3_moe", compensate=True, compensation_scope=scope)
    data, folder = RecoveryData.load(quick(), None, ROWS), RunFolder(tmp_path / "state", False)
    teacher = Teacher.prepare(tiny_model("qwen3_moe"), pruner.model, quick(), data, folder, pruner.applied_plan)
    assert teacher.stages["pruned"] == pytest.approx(held_out_loss(prune("qwen3_moe").model, data), abs=1e-6)
    assert teacher.stages["pruned"] != pytest.approx(held_out_loss(pruner.model, data), abs=1e-4)


def test_what_is_kept_is_better_and_loads_as_an_adapter_and_merged(pruned, model, tmp_path):
    recovery = run(model, tmp_path / "state", copy.deepcopy(pruned.base), pruned.plan, **DISTILLATION)
    report = recovery.report
    assert list(report.stages) == ["unpruned", "pruned", "pruned and compensated", "recovered by distillation"]
    assert report.improved and report.best_step in [entry["step"] for entry in report.history]
    assert [entry["step"] for entry in report.history] == [3, 6]
    data = RecoveryData.load(quick(), None, ROWS)
    for stage, expected in (("unpruned", tiny_model("qwen3_moe")), ("pruned and compensated", pruned.model)):
        assert report.stages[stage] == pytest.approx(held_out_loss(expected, data), abs=1e-5)
    kept = held_out_loss(recovery.model, data)
    assert report.stages["recovered by distillation"] == pytest.approx(kept, abs=1e-5)
    assert kept < report.stages["pruned and compensated"]

    trained = logits_of(recovery.model)
    save_adapter(recovery, None, tmp_path / "adapter")
    base = reload(pruned.folder)
    assert (logits_of(base) - trained).abs().max() > 0.01
    assert_close(logits_of(PeftModel.from_pretrained(base, tmp_path / "adapter")), trained, atol=1e-5)
    assert_close(logits_of(load_adapter(reload(pruned.folder), tmp_path / "adapter")), trained, atol=1e-5)

    save_merged(recovery, None, pruned.folder, tmp_path / "merged")
    merged = reload(tmp_path / "merged")
    assert type(merged) is type(pruned.model) and merged.config.expert_widths == pruned.model.config.expert_widths
    assert_close(logits_of(merged), trained)
    assert plan_of(tmp_path / "merged").widths == pruned.plan.widths
    saved = json.loads((tmp_path / "merged" / "heapr" / "recovery_report.json").read_text())
    assert saved["stages"] == report.stages and saved["improved"]
    again = run(merged, tmp_path / "again", targets="attention", max_steps=1, eval_steps=1)
    assert list(again.report.stages) == ["recovered before", "recovered"]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "## Recovery" in card and f"| {report.stages['unpruned']:.4f} |" in card


@pytest.fixture(scope="module")
def pruned_family(request, tmp_path_factory):
    """A pruned model of a family (make a copy before training it), and the folder that it was saved to."""
    model, folder = prune(request.param).model, tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("targets", ["attention", "experts"])
@pytest.mark.parametrize("pruned_family", ["qwen2_moe", "gpt_oss", "deepseek", "deepseek_v2"], indirect=True)
def test_families(pruned_family, targets, tmp_path):
    model, folder = pruned_family
    recovery = run(copy.deepcopy(model), tmp_path / "state", targets=targets, max_steps=2, eval_steps=2)
    assert recovery.report.improved
    trained = logits_of(recovery.model)
    save_adapter(recovery, None, tmp_path / "adapter")
    again = PeftModel.from_pretrained(reload(folder), tmp_path / "adapter")
    assert_close(logits_of(again), trained, atol=1e-5)
    assert_close(logits_of(recovery.merge()), trained)


@pytest.mark.parametrize(("targets", "layout"), [("router", "variable"), ("all", "uniform")])
def test_routers_and_stock_checkpoints(targets, layout, tmp_path):
    pruner = prune("qwen3_moe", layout=layout)
    pruner.model.save_pretrained(tmp_path / "pruned")
    recovery = run(pruner.model, tmp_path / "state", targets=targets)
    assert recovery.report.improved
    trained = logits_of(recovery.model)
    save_adapter(recovery, None, tmp_path / "adapter")
    base = reload(tmp_path / "pruned")
    assert base.config.model_type == ("qwen3_moe" if layout == "uniform" else "heapr_qwen3_moe")
    assert_close(logits_of(PeftModel.from_pretrained(base, tmp_path / "adapter")), trained, atol=1e-5)
    assert_close(logits_of(recovery.merge()), trained)


@pytest.mark.parametrize(
    ("targets", "layout"),
    [("attention", "variable"), ("router", "variable"), ("all", "variable"), ("all", "uniform")],
)
def test_a_part_of_the_update_lies_between_the_weights_before_and_after(targets, layout, tmp_path):
    pruner = prune("qwen3_moe", layout=layout)
    pruner.model.save_pretrained(tmp_path / "pruned")
    before = {name: p.detach().clone() for name, p in pruner.model.named_parameters()}
    whole = run(copy.deepcopy(pruner.model), tmp_path / "whole", targets=targets)
    part = run(pruner.model, tmp_path / "part", targets=targets, weight_interpolation=0.25)
    assert part.report.history == whole.report.history
    assert part.report.stages["recovered"] > whole.report.stages["recovered"]
    data = RecoveryData.load(quick(), None, ROWS)
    assert part.report.stages["recovered"] == pytest.approx(held_out_loss(part.model, data), abs=1e-6)
    trained = logits_of(part.model)
    save_adapter(part, None, tmp_path / "adapter")
    assert_close(logits_of(load_adapter(reload(tmp_path / "pruned"), tmp_path / "adapter")), trained, atol=1e-5)
    assert "kept is 0.25 of the update after step 6" in part.report.card_section()
    after, changed = dict(whole.merge().named_parameters()), 0
    for name, parameter in part.merge().named_parameters():
        assert_close(parameter, 0.75 * before[name] + 0.25 * after[name], atol=1e-6)
        changed += (parameter - before[name]).abs().max() > 1e-5
    assert changed


def test_stock_experts_of_a_width_that_grouped_mm_refuses(tmp_path):
    model = prune("qwen3_moe", layout="uniform", ratio=0.25).model
    assert model.config.moe_intermediate_size == 9  # 36 bytes a row
    implementation = {"": "grouped_mm"}
    assert model.get_experts_implementation() == implementation
    recovery = run(model, tmp_path / "state", max_steps=3)
    assert recovery.report.improved
    assert recovery.merge().get_experts_implementation() == implementation


def test_the_best_and_the_last_checkpoint_stay_until_the_end(model, tmp_path, monkeypatch):
    losses, seen = iter([3.0, 1.0, 2.0, 2.5, 2.0]), []

    def measured(prediction):
        seen.append(sorted(path.name for path in (tmp_path / "state").glob("checkpoint-*")))
        return {"held_out_loss": next(losses)}

    monkeypatch.setattr(trainer_module, "_held_out_loss", measured)
    run(model, tmp_path / "state", targets="attention", max_steps=5, eval_steps=1, patience=9)
    assert seen == [
        [],
        ["checkpoint-1"],
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-3"],
        ["checkpoint-2", "checkpoint-4"],
    ]


@pytest.mark.parametrize("targets", ["attention", "router"])
def test_no_warning_that_users_cannot_act_on(targets, pruned, model, tmp_path, recwarn):
    save_adapter(run(model, tmp_path / "state", targets=targets), None, tmp_path / "adapter")
    load_adapter(reload(pruned.folder), tmp_path / "adapter")
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_an_error_leaves_the_model_as_it_was(targets, pruned, model, tmp_path, monkeypatch):
    """Out of memory in the second step: less of it at once may go, so the model must be there to try again with."""
    model.train()
    model.lm_head.requires_grad_(False)
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    step, calls = RecoveryTrainer.training_step, []

    def short_of_memory(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
        return step(*arguments, **options)

    monkeypatch.setattr(RecoveryTrainer, "training_step", short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run(model, tmp_path / "first", targets=targets)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required
    assert all(module.training for module in model.modules())
    assert torch.equal(logits_of(model), logits_of(pruned.model))
    again = run(model, tmp_path / "second", targets=targets)
    expected = run(copy.deepcopy(pruned.model), tmp_path / "third", targets=targets)
    assert again.report.history == expected.report.history
    assert_close(logits_of(again.merge()), logits_of(expected.merge()))


def test_nothing_is_kept_if_nothing_improved(pruned, model, tmp_path):
    recovery = run(model, tmp_path / "state", targets="all", learning_rate=5.0, max_steps=20, eval_steps=1, patience=2)
    assert not recovery.report.improved and recovery.report.best_step == 0
    assert recovery.report.steps == 3, "two measurements after the first that are no better"
    assert not isinstance(recovery.model, PeftModel)
    assert torch.equal(logits_of(recovery.merge()), logits_of(pruned.model))
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in pruned.model.named_parameters()}


@pytest.mark.parametrize("targets", ["router", "all"])
@pytest.mark.parametrize(("learning_rate", "improves"), [(1e-2, True), (10.0, False)])
def test_weights_keep_their_type_and_are_what_they_were_if_nothing_improved(
    model, targets, learning_rate, improves, tmp_path
):
    """Norms and routers are trained as copies in float32, which took the place of the originals either way."""
    model = model.to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    recovery = run(model, tmp_path / "state", targets=targets, learning_rate=learning_rate)
    assert recovery.report.improved == improves
    merged = recovery.merge()
    after = merged.state_dict()
    assert after.keys() == before.keys()
    assert all(weight.dtype == before[name].dtype for name, weight in after.items())
    assert all(torch.equal(weight, before[name]) for name, weight in after.items()) == (not improves)
    assert torch.isfinite(logits_of(merged)).all()


def test_a_cached_teacher_says_what_one_beside_says(pruned, tmp_path):
    beside, cached = (
        run(
            copy.deepcopy(pruned.model),
            tmp_path / str(cache),
            copy.deepcopy(pruned.base),
            pruned.plan,
            cache_teacher=cache,
            **DISTILLATION,
        )
        for cache in (False, True)
    )
    assert beside.report.stages == pytest.approx(cached.report.stages)
    files = sorted(path.name for path in (tmp_path / "True" / "teacher").iterdir())
    assert files[0] == "000000.safetensors" and len(files) == 24 + 2
    assert_close(adapter_weights(cached), adapter_weights(beside), atol=1e-5)


def test_an_interrupted_run_goes_on(pruned, tmp_path, monkeypatch, capsys):
    options = {"targets": "experts", "max_steps": 4, "eval_steps": 2}
    monkeypatch.setattr(logging, "LINE_EVERY", 1e-9)
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    whole = run(copy.deepcopy(pruned.model), tmp_path / "whole", **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Recovering: ")]
    assert [line.split(",")[:2] for line in lines] == [
        [f"Recovering: {share}%", f" {done} of 4"] for share, done in ((25, 1), (50, 2), (75, 3))
    ]
    compute_loss, calls = RecoveryTrainer.compute_loss, []

    def stops(self, model, *arguments, **keywords):
        calls.append(model.training)
        if sum(calls) == 6:  # in the third step
            raise KeyboardInterrupt
        return compute_loss(self, model, *arguments, **keywords)

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", stops)
    with pytest.raises(KeyboardInterrupt):
        run(copy.deepcopy(pruned.model), tmp_path / "state", **options)
    monkeypatch.undo()
    with pytest.raises(HeaprError, match="a run that was interrupted; pass resume=True"):
        run(copy.deepcopy(pruned.model), tmp_path / "state", **options)
    other = {"config=.*the run in": {**options, "rank": 2}}
    for expected, changed in other.items():
        with pytest.raises(HeaprError, match=expected):
            run(copy.deepcopy(pruned.model), tmp_path / "state", resume=True, **changed)
    with pytest.raises(HeaprError, match="model=.*the run in"):
        run(prune("qwen3_moe", ratio=0.5).model, tmp_path / "state", resume=True, **options)
    (tmp_path / "state" / "checkpoint-3").mkdir()  # as a kill while it was written would leave it
    again = run(copy.deepcopy(pruned.model), tmp_path / "state", resume=True, **options)
    for resumed, unbroken in zip(again.report.history, whole.report.history, strict=True):
        assert resumed == pytest.approx(unbroken)
    assert_close(adapter_weights(again), adapter_weights(whole), atol=1e-6)


def test_micro_batches_checkpointing_and_bfloat16_give_the_same_to_tolerance(pruned, tmp_path):
    options = {"targets": "all", "max_steps": 3, "eval_steps": 3}
    losses = {
        name: run(copy.deepcopy(pruned.model), tmp_path / name, **options, **changed).report.history[-1]["loss"]
        for name, changed in {
            "plain": {},
            "accumulated": {"micro_batch_size": 1},
            "checkpointed": {"gradient_checkpointing": True},
            "bf16": {"bf16": True},
        }.items()
    }
    assert losses["accumulated"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["checkpointed"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=0.02) and losses["bf16"] != losses["plain"]


def test_one_process_takes_one_of_several_gpus(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(runner, "has_accelerator", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = runner._arguments(quick(micro_batch_size=2), RunFolder(tmp_path / "run"), False)
    assert not arguments.use_cpu and arguments.n_gpu == 1
    assert arguments.train_batch_size == 2 and arguments.parallel_mode.value == "not_parallel"


def test_weights_in_bfloat16_are_trained_in_float32(pruned, model, tmp_path, heapr_log, monkeypatch):
    monkeypatch.setattr(half_precision, "_has_products", lambda dtype: dtype == torch.float32)
    recovery = run(model.bfloat16(), tmp_path / "state", weight_interpolation=0.75)
    assert {p.dtype for p in recovery.model.parameters() if p.requires_grad} == {torch.float32}
    assert recovery.report.improved
    assert recovery.merge().dtype == torch.bfloat16
    assert "no instructions for products in bfloat16" in heapr_log.records[0].getMessage()


def test_teachers_that_cannot_be_are_refused(pruned, model, tmp_path):
    for changes, expected in (({"vocab_size": 64}, "vocabulary of 64"), ({"hidden_size": 16}, "hidden size of 16")):
        with pytest.raises(HeaprError, match=expected):
            run(model, tmp_path / "state", tiny_model("qwen3_moe", **changes), **DISTILLATION)
    with pytest.raises(HeaprError, match="teacher=None: distillation_weight=1.0 needs the unpruned model"):
        run(model, tmp_path / "state", **DISTILLATION)


def test_a_folder_of_something_else_is_not_taken_for_a_run_and_deleted(tmp_path):
    (tmp_path / "paper.tex").write_text("mine")
    for resume in (True, False):
        with pytest.raises(HeaprError, match="state='.*': holds something else than a run of recovery"):
            RunFolder(tmp_path, resume)
    assert [path.name for path in tmp_path.iterdir()] == ["paper.tex"]


def test_that_there_is_nothing_to_go_on_from_is_said_where_there_is_nothing(tmp_path, heapr_log):
    (tmp_path / "by_the_teacher" / "teacher").mkdir(parents=True)  # it is written down before the student's run begins
    (tmp_path / "temporary").mkdir()
    for name in ("by_the_teacher", "temporary", "none"):
        RunFolder(tmp_path / name, resume=True).begin({})
    expected = f"state='{tmp_path / 'none'}': resume=True finds nothing there to go on from; it begins anew"
    assert [record.getMessage() for record in heapr_log.records] == [expected]


def test_models_that_were_not_pruned_are_refused(tmp_path):
    with pytest.raises(HeaprError, match="has no heapr_config; name a model that was pruned"):
        run(tiny_model("qwen3_moe"), tmp_path / "state")
    with pytest.raises(HeaprError, match="dtype=float16"):
        run(prune("qwen3_moe").model.half(), tmp_path / "state")


def test_a_loss_that_is_not_finite_ends_the_run(pruned, model, tmp_path, monkeypatch):
    compute_loss = RecoveryTrainer.compute_loss

    def breaks(self, model, *arguments, **keywords):
        if model.training:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(math.nan)
        return compute_loss(self, model, *arguments, **keywords)

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", breaks)
    with pytest.raises(HeaprError, match="loss=nan: not finite in step 1; lower learning_rate=0.01"):
        run(model, tmp_path / "state")


def test_an_adapter_of_another_plan_is_refused(pruned, model, tmp_path):
    recovery = run(model, tmp_path / "state", targets="attention", max_steps=2, eval_steps=1)
    save_adapter(recovery, None, tmp_path / "adapter")
    with pytest.raises(HeaprError, match="was trained on a model with weights"):
        load_adapter(prune("qwen3_moe", ratio=0.5).model, tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(HeaprError, match="holds no adapter_config.json"):
        load_adapter(pruned.model, tmp_path / "adapter")


def test_the_pruner_recovers_what_it_pruned(tmp_path):
    pruner = prune("qwen3_moe")
    with pytest.raises(HeaprError, match="state"):
        (tmp_path / "state").mkdir()
        pruner.recover(ROWS, quick(), state_path=tmp_path / "state")
    with pytest.raises(HeaprError, match="state_path=None: resume=True needs a folder; name one"):
        pruner.recover(ROWS, quick(), resume=True)
    pruner.model.name_or_path = "unpruned"  # as of a model that was loaded and pruned in memory
    report = pruner.recover(ROWS, quick(**DISTILLATION), tiny_model("qwen3_moe"), adapter_folder=tmp_path / "adapter")
    assert report.improved and (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == ""
    with pytest.raises(HeaprError, match="is an adapter of a model that was in memory"):
        load_model(tmp_path / "adapter")
    pruner.save_pretrained(tmp_path / "recovered")
    assert "## Recovery" in (tmp_path / "recovered" / "README.md").read_text()
    assert_close(logits_of(reload(tmp_path / "recovered")), logits_of(pruner.model), atol=1e-5)
    unpruned = prune("qwen3_moe")
    unpruned.applied_plan = None
    with pytest.raises(HeaprError, match="was not pruned yet"):
        unpruned.recover(ROWS, quick())
