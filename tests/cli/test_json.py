# Licensed under the Apache License, Version 2.0
"""With `--json` standard output is one JSON document, whatever the command; messages go to standard error."""

import json

import pytest

from optimum_heapr import AtomicStatistics, PruningPlan
from optimum_heapr.families import Family
from optimum_heapr.planning.size import planned_sizes
from tests.cli.conftest import CALIBRATION_FLAGS


PRUNING = ["--ratio", "0.25", "--eval-samples", "2", "--num-samples", "6"]


@pytest.fixture
def found(run):
    """Runs a command with `--json` and returns its document and its messages."""

    def found(*arguments):
        result = run(*arguments, "--json")
        assert result.status == 0, result.error
        return json.loads(result.output), result.error

    return found


def test_calibrate_and_inspect(inputs, found, tmp_path):
    path = tmp_path / "statistics.safetensors"
    document, messages = found("calibrate", "-m", inputs.model, *inputs.calibration, "-o", path)
    statistics = AtomicStatistics.load(path)
    assert document["output"] == str(path) and f"Statistics written to {path}" in messages
    assert (
        document["data"]["num_tokens"] == statistics.num_tokens and document["cost"]["tokens"] == statistics.num_tokens
    )
    assert [block["tokens"] for block in document["blocks"]] == [
        block.token_count.tolist() for block in statistics.blocks.values()
    ]
    assert not document["serves_compensation"]
    shown, messages = found("inspect", path)
    assert shown == {name: part for name, part in document.items() if name not in ("output", "cost")} and not messages
    other = tmp_path / "other.safetensors"
    found("calibrate", "-m", inputs.model, "--dataset", inputs.tokens, *CALIBRATION_FLAGS, "-o", other)
    merged, _ = found("merge", path, other, "-o", tmp_path / "merged.safetensors")
    assert merged["data"]["num_tokens"] == statistics.num_tokens + AtomicStatistics.load(other).num_tokens


def test_plan_and_inspect(inputs, found, tmp_path):
    path = tmp_path / "plan.safetensors"
    asked = ["plan", "-s", inputs.statistics, "--ratio", 0.5, "-o", path]
    dry, messages = found(*asked, "--dry-run")
    assert dry["output"] is None and not messages and not path.exists()
    document, messages = found(*asked)
    plan = PruningPlan.load(path)
    assert document == dry | {"output": str(path)} and messages == f"Plan written to {path}\n"
    assert (
        document["removed"]["ratio"] == plan.ratio and document["blocks"][1]["widths"] == list(plan.widths.values())[1]
    )
    before, after = planned_sizes(plan)
    assert [document["planned_size"][side]["num_bytes"] for side in ("before", "after")] == [
        before.num_bytes,
        after.num_bytes,
    ]
    assert found("inspect", path)[0] == {name: part for name, part in document.items() if name != "output"}
    compared, _ = found("inspect", path, inputs.plan)
    assert compared[-1]["path"] == "all" and compared[-1]["kept"][0] == plan.total - plan.removed


def test_prune_and_apply(inputs, found, tmp_path):
    output = tmp_path / "pruned"
    asked = ["prune", "-m", inputs.model, *inputs.calibration, *PRUNING]
    dry, messages = found(*asked, "--dry-run")
    assert dry["output"] is None and "keeps no statistics" in messages
    document, messages = found(*asked, "-o", output)
    assert document["output"] == str(output) and document["pushed"] is None and str(output) in messages
    report = json.loads((output / "heapr" / "report.json").read_text())
    assert report.items() <= document.items() and "measured" in document["loss"]
    assert document["planned_size"] == dry["planned_size"]
    assert found("inspect", output)[0] == report
    applied, _ = found("apply", "-m", inputs.model, "-p", output, "-o", tmp_path / "applied")
    assert applied["blocks"] == document["blocks"]


def test_families(found, monkeypatch):
    family = Family("qwen3_moe", "Qwen3MoeForCausalLM", "tested", "")
    monkeypatch.setattr("optimum_heapr.families.scan_families", lambda: [family])
    assert found("families") == ([vars(family)], "")


def test_quiet_leaves_the_document_alone(inputs, found):
    document, messages = found("prune", "-m", inputs.model, *inputs.calibration, *PRUNING, "--dry-run", "--quiet")
    assert document["removed"] and not messages


def test_numbers_that_are_none_are_null(inputs, found, monkeypatch):
    monkeypatch.setattr("optimum_heapr.cli.documents.plan_document", lambda plan: {"loss": [float("nan"), 1.0]})
    assert found("plan", "-s", inputs.statistics, "--dry-run")[0] == {"output": None, "loss": [None, 1.0]}


def test_a_mistake_is_one_line_all_the_same(inputs, run):
    result = run("plan", "-s", inputs.statistics, "--width-multiple", 99, "--json")
    assert result.status == 2 and not result.output and result.error.count("\n") == 1
