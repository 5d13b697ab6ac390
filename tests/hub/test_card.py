# Licensed under the Apache License, Version 2.0
"""The model card says what was done and what was measured, in the form that the Hub takes, and invents nothing."""

import functools
import importlib.metadata
import re
from dataclasses import replace

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.checkpoints.saving import apply_streaming
from optimum_heapr.checkpoints.stages import load_stages
from optimum_heapr.hub.base_model import BaseModel
from optimum_heapr.hub.card import held_out_result, model_card, perplexity_result, without_measurements, write_card
from optimum_heapr.report.content import without_measurements as report_without_measurements
from tests.helpers import random_ids, tiny_model, tiny_tokenizer
from tests.report.reports import measured_pruner


BASE = BaseModel("owner/base", True, "0" * 40, {"license": "apache-2.0", "language": ["en"]})


@functools.cache
def pruner() -> HeaprPruner:
    pruner = HeaprPruner(tiny_model(), tiny_tokenizer(), HeaprConfig(ratio=0.25, num_samples=4, seq_length=24))
    pruner.calibrate(Dataset.from_dict({"input_ids": random_ids(4, 24).tolist()}))
    pruner.prune()
    return pruner


def card(base: BaseModel = BASE, results=(), source: str | None = None, **changes) -> ModelCard:
    plan = pruner().applied_plan
    if source:
        plan = replace(plan, data={**plan.data, "source": source})
    plan = replace(plan, config=plan.config.replace(**changes))
    return ModelCard(str(model_card(pruner().model, plan, base, results)))


def test_metadata():
    assert card().data.to_dict() == {
        "base_model": "owner/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "pruning", "heapr", "optimum-heapr"],
        "license": "apache-2.0",
        "language": ["en"],
    }


@pytest.mark.parametrize(
    "source, names",
    [
        ("owner/text", ["owner/text"]),
        ("wikitext", ["wikitext"]),
        ("demo", None),
        ("Dataset", None),
        ("/somewhere/text.jsonl", None),
        ("folder/text.jsonl", None),
        ("./folder", None),
    ],
)
def test_datasets_are_names_on_the_hub(source, names):
    found = card(source=source, dataset=None if source == "Dataset" else source)
    assert found.data.to_dict().get("datasets") == names
    assert "/somewhere/" not in found.text.split("## Recipe")[0]


def test_nothing_is_invented():
    """No base model on the Hub, no licence, no figures: none of them in the card."""
    found = card(BaseModel("folder"))
    assert not {"base_model", "license", "model-index", "datasets"} & set(found.data.to_dict())
    assert "was not measured" in found.text and "## Measured" not in found.text


def test_measured_figures_become_the_model_index():
    measured = {"perplexity": 12.5, "loss": 2.5, "loss_standard_error": 0.1, "num_tokens": 1000}
    found = card(results=[perplexity_result(measured, "owner/text", "plain")])
    (index,) = found.data.to_dict()["model-index"]
    (result,) = index["results"]
    assert index["name"] == "base-heapr-25"
    assert result["dataset"] == {"name": "owner/text", "type": "owner/text", "config": "plain", "split": "test"}
    assert result["metrics"][0]["type"] == "perplexity" and result["metrics"][0]["value"] == 12.5
    assert "| owner/text plain | test | perplexity over 1,000 tokens | 12.5000 |" in found.text
    assert "was not measured" not in found.text
    assert found.data.eval_results[0].metric_value == 12.5


def test_body():
    plan, text = pruner().applied_plan, card().text
    assert f"| routed atomic experts | 144 | {144 - plan.removed} | {plan.ratio:.2%} |" in text
    parameters = pruner().model.num_parameters()
    assert f"| {plan.model['num_parameters']:,} | {parameters:,} | {plan.parameter_ratio:.2%} |" in text
    for path, widths in plan.widths.items():
        assert f"| `{path}` | 6 | 12 | {sum(widths) / 72:.1%} | {min(widths)} | {max(widths)} |" in text
    assert HeaprConfig.from_dict(yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])) == plan.config
    for package in ("optimum-heapr", "transformers", "torch"):
        assert f"{package} {importlib.metadata.version(package)}" in text
    assert "96 tokens in 4 samples" in text


def test_unreached_experts_are_named():
    plan = replace(pruner().applied_plan, unreached={"model.layers.1.mlp.experts": [2, 3]})
    text = str(model_card(pruner().model, plan, BASE))
    assert "reached 2 experts; they were ranked without having been measured" in text
    protected = replace(plan, config=plan.config.replace(protect_unreached=True))
    assert "they stayed as they were" in str(model_card(pruner().model, protected, BASE))


def test_training_of_blocks_is_said():
    done = {"removed": 0.3, "fitted": 0.2, "trained": 0.1, "kept": "trained"}
    changes = {"compensate": True, "compensation_scope": "block", "reconstruction_steps": 77}
    plan = pruner().applied_plan
    for trained in (0, 1):
        kept = {path: {**done, "kept": "trained" if trained else "fitted"} for path in list(plan.kept)[:1]}
        made = replace(plan, config=plan.config.replace(**changes), reconstruction=kept)
        text = str(model_card(pruner().model, made, BASE))
        assert (
            "of 1 layers was then trained on the outputs of the unpruned layers, for 77 steps each" in text
        ) == trained


def test_loading_instructions_follow_the_checkpoint():
    variable = str(model_card(pruner().model, pruner().applied_plan, BASE, has_code=True))
    stock = str(model_card(pruner().model, pruner().applied_plan, BASE, has_code=False))
    assert "import optimum_heapr" in variable and "trust_remote_code=True" in variable
    assert "import optimum_heapr" not in stock and "trust_remote_code" not in stock


@pytest.mark.parametrize("text", ["", "No metadata.", "---\nlicense: [\n---\n", "---\n- a list\n---\n"])
def test_a_base_card_that_says_nothing(text, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(text)
    base = load_stages(tmp_path, HeaprConfig()).stages.base
    assert base == BaseModel(tmp_path.name)


def test_a_local_base_gives_its_licence(tmp_path):
    """By both ways to prune; and the card of a folder names the folder, not what is above it."""
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\nA model.\n")
    loaded = HeaprPruner.from_pretrained(tmp_path / "model")
    loaded.apply(pruner().applied_plan)
    loaded.save_pretrained(tmp_path / "memory")
    apply_streaming(tmp_path / "model", pruner().applied_plan, tmp_path / "stream")
    found = ModelCard.load(tmp_path / "memory" / "README.md")
    assert found.data.license == "mit" and "mine" not in found.data.tags and found.data.base_model is None
    assert str(found) == (tmp_path / "stream" / "README.md").read_text() and str(tmp_path) not in str(found)


def test_what_the_report_says_is_in_the_card(tmp_path):
    """The plot, which lies beside it, and what was measured; not the speed, which is that of one machine."""
    folder = measured_pruner().save_pretrained(tmp_path / "pruned")
    report, found = measured_pruner().report, ModelCard.load(folder / "README.md")
    (name,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", found.text)
    assert (folder / name).read_text().startswith("<svg") and "report.html" in found.text
    (result,) = found.data.eval_results
    measured = report["loss"]["measured"]
    assert result.metric_value == measured["after"]["perplexity"] and result.dataset_name == "Dataset (held out)"
    assert f"± {measured['increase_standard_error']:.4f}" in found.text and "was not measured" not in found.text
    assert "tokens/s" not in found.text and "speed" in report


def test_figures_of_a_model_that_has_changed_are_taken_out(tmp_path):
    folder = measured_pruner().save_pretrained(tmp_path / "pruned")
    before = (folder / "README.md").read_text()
    text = without_measurements(before)
    found, old = ModelCard(text), ModelCard(before)
    assert "model-index" in before and "model-index" not in text and "## Measured" not in text
    assert found.data.tags == old.data.tags and found.data.to_dict()["library_name"] == "transformers"
    for heading in ("## Use it", "## What was removed", "## Recipe", "## Limits"):
        assert heading in text
    report = report_without_measurements(measured_pruner().report, "it was trained")
    assert report["loss"].keys() == {"estimated_increase"} and not {"speed", "samples"} & set(report)
    assert report["size"] == measured_pruner().report["size"] and report["problems"] == ["it was trained"]
    assert "measured" in measured_pruner().report["loss"]


@pytest.mark.parametrize(
    "source, kind",
    [
        ("owner/text", "owner/text"),
        ("a.jsonl:0.5,owner/b[train]:0.5", "a.jsonl-0.5-owner-b-train-0.5"),
        ("my text (1).jsonl", "my-text-1-.jsonl"),
    ],
)
def test_names_of_texts_have_the_form_that_the_hub_takes(source, kind):
    figures = {"perplexity": 12.5, "loss": 2.5, "loss_standard_error": 0.1, "num_tokens": 1000}
    result = held_out_result({"source": source, "held_out": True, "after": figures})
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == (kind, f"{source} (held out)", None)


@pytest.mark.skipif(
    importlib.metadata.version("huggingface_hub").startswith("1."),
    reason="huggingface_hub 1 asks a Hub that is not this one",
)
def test_the_hub_takes_it(hub, run_python, tmp_path):
    measured = {"perplexity": 12.5, "loss": 2.5, "loss_standard_error": 0.1, "num_tokens": 1000}
    pruner().model.save_pretrained(tmp_path)
    results, report = [perplexity_result(measured, "owner/text")], measured_pruner().report
    write_card(tmp_path, pruner().model, pruner().applied_plan, BASE, results, report)
    code = "from huggingface_hub import ModelCard\nModelCard.load(sys.argv[1]).validate()\nanswer(True)"
    assert run_python(code, tmp_path / "README.md")
    assert hub.requests[-1] == ("POST", "/api/validate-yaml")
