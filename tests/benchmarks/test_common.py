# Licensed under the Apache License, Version 2.0
"""What the benchmarks report: whole windows of single documents, standard errors by document, records that a run goes on from."""

import copy
import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.experts import find_expert_blocks
from tests.helpers import calibration_data, random_ids, tiny_model


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ELSEWHERE = {"llmcompressor_reap"}  # run in another environment


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("common")


@pytest.mark.parametrize("name", sorted({path.stem for path in BENCHMARKS.glob("*.py")} - ELSEWHERE))
def test_every_benchmark_finds_what_it_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert importlib.import_module(name).__doc__


def test_fits_over_blocks_are_those_of_the_package(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("sequential_compensation")
    model, data = tiny_model("deepseek"), calibration_data(*[24] * 8)
    config = HeaprConfig(ratio=0.5, compensate=True, compensation_scope="block", batch_size=4)
    pruner = HeaprPruner(copy.deepcopy(model), config=config)
    pruner.statistics, pruner.calibration_data = calibrate(model, data, 4), data
    plan, ids = pruner.plan(), random_ids()
    batches = dict(enumerate(data.micro_batches(4)))
    logits = {method: script.prune(model, batches, plan.kept, method)(ids).logits for method in script.METHODS}
    torch.testing.assert_close(logits["block"], pruner.apply(plan)(ids).logits, rtol=1e-4, atol=1e-5)
    assert len({float(values.sum()) for values in logits.values()}) == len(script.METHODS)  # each fits something else


def increase(common, differences, documents):
    losses = {"text": torch.tensor(differences, dtype=torch.float64)}
    base = {"text": torch.zeros(len(differences), dtype=torch.float64)}
    windows = {"text": common.Windows(torch.zeros(len(differences), 2), torch.tensor(documents))}
    return common.Increase.over(losses, base, windows, ["text"])


def test_error_of_one_window_a_document_is_the_usual_one(common):
    differences = [0.1, 0.4, 0.2, 0.9]
    found = increase(common, differences, [0, 1, 2, 3])
    assert found.value == pytest.approx(0.4)
    assert found.error == pytest.approx(torch.tensor(differences, dtype=torch.float64).std().item() / math.sqrt(4))


def test_windows_that_repeat_their_document_add_no_precision(common):
    alone = increase(common, [0.1, 0.4, 0.3], [0, 1, 2])
    repeated = increase(common, [0.1, 0.4, 0.3] * 5, [0, 1, 2] * 5)
    assert repeated.value == pytest.approx(alone.value)
    assert repeated.error == pytest.approx(alone.error)


def test_one_document_has_no_error(common):
    assert math.isnan(increase(common, [0.1, 0.2], [0, 0]).error)


def test_windows_are_whole_and_come_from_documents_by_turns(common, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [list(range(10)), [20, 21], list(range(30, 37))]
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    windows = common.evaluation_windows(str(file), None, rows=4, length=3)
    assert windows.ids.tolist() == [[0, 1, 2], [30, 31, 32], [3, 4, 5], [33, 34, 35]]
    assert windows.document.tolist() == [0, 1, 0, 1]


def record(method, ratio, value):
    return {"method": method, "ratio": ratio, "increase": {"in domain": {"value": value, "error": 0.001}}}


def test_results_are_written_after_each_record_and_resumed(common, tmp_path):
    about = {"domains": {"in domain": ["text"]}, "calibration": {"seed": 0}, "rows": {"text": 4}}
    results = common.Results(str(tmp_path / "found"), about, ["first", "second"])
    results.add(**record("second", 0.5, 0.2))
    results.add(**record("first", 0.25, 0.1))
    table = (
        "| method | in domain, 25% | in domain, 50% |\n|---|---|---|\n"
        "| first | 0.1000 ± 0.0010 |  |\n| second |  | 0.2000 ± 0.0010 |\n"
    )
    assert (tmp_path / "found.md").read_text(encoding="utf-8") == table
    resumed = common.Results(str(tmp_path / "found"), about, ["first", "second"])
    resumed.resume()
    assert resumed.has("first", 0.25) and not resumed.has("first", 0.5)
    assert resumed.markdown() == table


def test_results_of_another_model_are_not_resumed(common, tmp_path):
    output = str(tmp_path / "found")
    about = {"domains": {"in domain": ["text"]}, "calibration": {"seed": 0}}
    common.Results(output, about, ["first"]).add(**record("first", 0.5, 0.1))
    with pytest.raises(SystemExit, match="another model or other data"):
        common.Results(output, {**about, "calibration": {"seed": 1}}, ["first"]).resume()


def test_what_is_cut_is_zero_and_comes_back(common):
    model = tiny_model("qwen3_moe")
    statistics = calibrate(model, calibration_data(24, 24), gram=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = {path: [torch.arange(1, block.width)] * block.num_experts for path, block in statistics.blocks.items()}
    with common.restored(model):
        common.zero_and_compensate(model, statistics, kept)
        for block in find_expert_blocks(model):
            assert not block.module.down_proj[..., 0].any() and block.module.down_proj[..., 1:].any()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
