# Licensed under the Apache License, Version 2.0
"""`report.json` says what was done and what was measured, by independent count."""

import json
import math
import statistics as stats

import pytest
import torch
from datasets import Dataset

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from optimum_heapr.evaluation.perplexity import evaluate_perplexity
from optimum_heapr.report import observation
from optimum_heapr.report.content import build_report
from optimum_heapr.report.observation import Workload
from tests.helpers import CHAT_TEMPLATE, SENTENCES, random_ids, random_statistics, tiny_model, tiny_tokenizer
from tests.report.reports import measured_pruner


def test_it_is_plain_json():
    report = measured_pruner().report
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_what_was_removed_where():
    pruner, report = measured_pruner(), measured_pruner().report
    plan = pruner.applied_plan
    assert report["removed"]["before"] == 2 * 6 * 12
    assert report["removed"]["after"] == sum(sum(block["widths"]) for block in report["blocks"])
    assert report["removed"]["ratio"] == pytest.approx(0.4, abs=0.005)
    for block in report["blocks"]:
        module = pruner.model.get_submodule(block["path"])
        assert block["widths"] == module.widths and block["width"] == 12
        assert block["tokens"] == pruner.statistics.blocks[block["path"]].token_count.tolist()
        cut = [e for e, width in enumerate(block["widths"]) if 0 < width < 12]
        errors = [plan.compensation[block["path"]][e] for e in cut]
        assert block["compensation"]["experts"] == len(cut)
        assert block["compensation"]["before"] == pytest.approx(stats.fmean(before for before, _ in errors))
        assert block["compensation"]["after"] == pytest.approx(stats.fmean(after for _, after in errors))
        assert block["compensation"]["after"] < block["compensation"]["before"]


def test_sizes_are_those_of_the_models():
    size, pruned = measured_pruner().report["size"], measured_pruner().model
    for side, model in (("before", tiny_model()), ("after", pruned)):
        assert size[side]["parameters"] == sum(p.numel() for p in model.parameters())
        assert size[side]["weight_bytes"] == 4 * size[side]["parameters"]
    assert size["after"]["active_parameters"] < size["before"]["active_parameters"] < size["before"]["parameters"]


def test_the_loss_is_measured_on_what_calibration_left_over():
    pruner, measured = measured_pruner(), measured_pruner().report["loss"]["measured"]
    data = pruner.calibration_data
    assert len(data.samples) == 6 and len(data.held_out) == 4 and measured["held_out"]
    stream = [token for sample in [*data.samples, *data.held_out] for token in sample.tolist()]
    assert len(stream) == 10 * 24  # one after the other, nothing twice
    rows = Dataset.from_dict({"input_ids": [sample.tolist() for sample in data.held_out]})
    for side, model in (("before", tiny_model()), ("after", pruner.model)):
        assert measured[side] == pytest.approx(evaluate_perplexity(model, None, rows, seq_length=24), rel=1e-5)
    assert measured["increase"] == pytest.approx(measured["after"]["loss"] - measured["before"]["loss"], abs=1e-6)
    apart = math.hypot(measured["before"]["loss_standard_error"], measured["after"]["loss_standard_error"])
    assert 0 < measured["increase_standard_error"] < apart  # the same windows: hard ones are hard for both


def test_completions_are_greedy():
    pruner, tokenizer = measured_pruner(), tiny_tokenizer()
    sample, model = pruner.report["samples"][0], pruner.model
    workload = Workload.of(pruner.applied_plan.config, tokenizer, pruner.calibration_data)
    ids, prompt = workload.prompts[0].tolist(), workload.prompts[0]
    assert tokenizer.decode(prompt, skip_special_tokens=True) == sample["prompt"] and sample["prompt"]
    for _ in range(observation.COMPLETION_TOKENS):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert sample["after"] == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert len(pruner.report["samples"]) == 3 and sample["before"]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["tail", "A second text that is long enough."], "A second text"),  # where a text begins
        (["no\nline begins after the first of it, and then it goes on and on"], "line begins"),
        (["in the middle of the one that there is and no more than that"], "in the middle"),
        (["tail of one that goes on until here", "end"], "tail of one"),  # not into the next
    ],
)
def test_a_prompt_is_of_one_text(texts, expected):
    tokenizer = tiny_tokenizer()
    joined = "<|end|>".join(texts) + "<|end|>"
    prompt = tokenizer.decode(observation._beginning(torch.tensor(tokenizer(joined)["input_ids"]), tokenizer))
    assert prompt.startswith(expected) and "<|end|>" not in prompt and len(prompt) > 8


def test_speed_is_measured():
    speed = measured_pruner().report["speed"]
    for side in ("before", "after"):
        assert speed[side]["prefill"] > 0 and speed[side]["decode"] > 0 and speed[side]["peak_bytes"] is None


def pruner_of(**options) -> HeaprPruner:
    return HeaprPruner(tiny_model(), tiny_tokenizer(), HeaprConfig(num_samples=4, seq_length=24, **options))


def test_nothing_is_measured_when_told_or_when_there_is_nothing_to_measure_on():
    for options, texts in (({"eval_samples": 0}, SENTENCES * 6), ({}, SENTENCES[:1] * 2)):
        pruner = pruner_of(**options)
        pruner.calibrate(Dataset.from_dict({"text": list(texts)}))
        pruner.prune()
        assert "measured" not in pruner.report["loss"] and "speed" not in pruner.report
        assert pruner.report["size"]["after"]["parameters"] == pruner.model.num_parameters()


def test_another_text_and_other_prompts(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    pruner = pruner_of(eval_dataset=str(path), eval_samples=2)
    pruner.calibrate(Dataset.from_dict({"input_ids": random_ids(9, 24).tolist()}))
    assert pruner.calibration_data.held_out == []
    pruner.prune(prompts=["A router"])
    measured = pruner.report["loss"]["measured"]
    assert measured["windows"] == 2 and measured["source"] == "text.jsonl" and not measured["held_out"]
    assert [sample["prompt"] for sample in pruner.report["samples"]] == ["A router"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([""], "prompts: '' has no tokens; write something to go on from"),
        (["A dog", " "], "prompts: ' ' has no tokens"),
        ([], "prompts=\\[\\]: has none; leave it out for beginnings of the text"),
        ("A dog", "prompts='A dog': is of type str; pass a list of texts"),
        (3, "prompts=3: is of type int; pass a list of texts"),
        ([3], "prompts: 3 is of type int; each is a text"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_completed_are_refused_before_calibration(prompts, message, monkeypatch):
    pruner = pruner_of()
    monkeypatch.setattr(type(pruner), "calibrate", lambda *arguments, **options: pytest.fail("was calibrated"))
    for tokenizer in (pruner.tokenizer, tiny_tokenizer(chat_template=CHAT_TEMPLATE)):
        pruner.tokenizer = tokenizer
        with pytest.raises(HeaprError, match=message):
            pruner.prune(prompts=prompts)


def test_prompts_that_are_not_completed_are_said_or_refused(heapr_log):
    pruner = pruner_of(eval_samples=0)
    pruner.calibrate(Dataset.from_dict({"input_ids": random_ids(9, 24).tolist()}))
    with pytest.raises(HeaprError, match="prompts: are completed where the model is measured; pass measure=True"):
        pruner.apply(pruner.plan(), prompts=["A dog"])
    pruner.prune(prompts=["A dog"])
    assert "prompts are not completed, as nothing is measured" in heapr_log.text


def test_prompts_are_rendered_by_the_chat_template():
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    pruner = measured_pruner()
    workload = Workload.of(pruner.config, tokenizer, pruner.calibration_data, ["A dog?"])
    assert tokenizer.decode(workload.prompts[0]) == "user: A dog?\nassistant: "
    with pytest.raises(HeaprError, match="no tokenizer"):
        Workload.of(pruner.config, None, pruner.calibration_data, ["A dog?"])


def test_what_cannot_be_measured_stops_nothing(heapr_log, monkeypatch):
    """Hours of calibration are worth more than a figure of the report."""
    pruner = pruner_of()
    pruner.calibrate(Dataset.from_dict({"text": list(SENTENCES * 6)}))
    monkeypatch.setattr(
        type(pruner.model), "generate", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no cache"))
    )
    pruner.prune()
    assert "measured" in pruner.report["loss"] and "speed" not in pruner.report and "samples" not in pruner.report
    assert pruner.report["problems"][0] == "before: speed: RuntimeError: no cache"
    assert "the report is without speed (RuntimeError: no cache)" in heapr_log.text


def test_a_plan_alone_gives_what_it_knows():
    plan = PruningPlan.build(random_statistics(), HeaprConfig())
    report = build_report(plan, "model")
    assert not {"size", "speed", "samples", "problems"} & set(report)
    assert report["importance"]["cut"] is not None and report["blocks"][0]["tokens"]


def test_no_folder_of_the_user_is_named():
    plan = PruningPlan.build(random_statistics(), HeaprConfig())
    plan.data["source"] = "/home/me/a.jsonl:0.5,/home/me/b.jsonl:0.5"
    assert build_report(plan, "model")["calibration"]["source"] == "a.jsonl:0.5,b.jsonl:0.5"
