# Licensed under the Apache License, Version 2.0
"""`--reduction-over-sources`, and what each source of a mixture loses."""

import json
import re

import pytest

from optimum_heapr.planning.plan import PruningPlan
from tests.helpers import SENTENCES


@pytest.fixture
def mixture(tmp_path):
    """A mixture of two files, as `--dataset` takes it."""
    for name, sentences in (("prose", SENTENCES[:3]), ("code", SENTENCES[3:])):
        lines = (json.dumps({"text": text}) + "\n" for text in sentences * 5)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return f"{tmp_path / 'prose.jsonl'}:2,{tmp_path / 'code.jsonl'}:1"


def test_a_plan_by_the_worst_source_says_what_each_loses(mixture, inputs, run, tmp_path):
    statistics, plan = tmp_path / "mixed.safetensors", tmp_path / "plan.safetensors"
    flags = ("--num-samples", 9, "--seq-length", 16, "--eval-samples", 0)
    made = run("calibrate", "-m", inputs.model, "--dataset", mixture, *flags[:4], "-o", statistics)
    assert made.status == 0, made.error
    planned = run("plan", "-s", statistics, "--ratio", 0.4, "--reduction-over-sources", "max", "-o", plan)
    assert planned.status == 0, planned.error
    losses = {source["name"]: source["increase"] for source in PruningPlan.load(plan).sources}
    assert list(losses) == ["code.jsonl", "prose.jsonl"] and min(losses.values()) > 0
    said = "Estimated by source, without compensation: code.jsonl +{:.4f}, prose.jsonl +{:.4f} nats a token; {} loses most"
    line = said.format(*losses.values(), max(losses, key=losses.get))
    assert line in planned.output and line in run("inspect", plan).output

    by_mean = run("plan", "-s", statistics, "--ratio", 0.4, "--dry-run")
    found = re.search(r"code.jsonl \+([\d.]+), prose.jsonl \+([\d.]+)", by_mean.output)
    assert found and max(map(float, found.groups())) != pytest.approx(max(losses.values()), abs=1e-6)

    pruned = run("prune", "-m", inputs.model, "--dataset", mixture, *flags, "-o", tmp_path / "pruned")
    assert pruned.status == 0, pruned.error
    report = json.loads((tmp_path / "pruned" / "heapr" / "report.json").read_text())
    assert [source["name"] for source in report["loss"]["by_source"]] == ["code.jsonl", "prose.jsonl"]
    assert "loses most" in (tmp_path / "pruned" / "heapr" / "report.md").read_text()


def test_what_cannot_be_ranked_by_sources_is_refused_before_work_is_spent(inputs, run, tmp_path):
    asked, output = ("--reduction-over-sources", "max"), tmp_path / "pruned"
    flags = ("prune", "-m", tmp_path / "no model is needed to say so", "--dataset", inputs.text, *asked, "-o", output)
    one = run(*flags)
    assert one.status == 2 and f"--dataset {inputs.text} is one source; name a mixture" in one.error
    criterion = run(*flags, "--criterion", "obs")
    assert criterion.status == 2 and "--criterion obs: --reduction-over-sources max needs one of" in criterion.error
    planned = run("plan", "-s", inputs.statistics, *asked, "-o", tmp_path / "plan.safetensors")
    assert planned.status == 2 and "the calibration text is one source" in planned.error
    assert not output.exists() and not (tmp_path / "plan.safetensors").exists()
