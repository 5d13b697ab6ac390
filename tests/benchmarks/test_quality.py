# Licensed under the Apache License, Version 2.0
"""What `benchmarks/quality.py` reports: whole windows of single documents, and standard errors by document."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ELSEWHERE = {"llmcompressor_reap"}  # run in another environment


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("quality")


@pytest.mark.parametrize("name", sorted({path.stem for path in BENCHMARKS.glob("*.py")} - ELSEWHERE))
def test_every_benchmark_finds_what_it_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert importlib.import_module(name).__doc__


def increase(quality, differences, documents):
    losses = {"text": torch.tensor(differences, dtype=torch.float64)}
    base = {"text": torch.zeros(len(differences), dtype=torch.float64)}
    windows = {"text": quality.Windows(torch.zeros(len(differences), 2), torch.tensor(documents))}
    return quality.Increase.over(losses, base, windows, ["text"])


def test_error_of_one_window_a_document_is_the_usual_one(quality):
    differences = [0.1, 0.4, 0.2, 0.9]
    found = increase(quality, differences, [0, 1, 2, 3])
    assert found.value == pytest.approx(0.4)
    assert found.error == pytest.approx(torch.tensor(differences, dtype=torch.float64).std().item() / math.sqrt(4))


def test_windows_that_repeat_their_document_add_no_precision(quality):
    alone = increase(quality, [0.1, 0.4, 0.3], [0, 1, 2])
    repeated = increase(quality, [0.1, 0.4, 0.3] * 5, [0, 1, 2] * 5)
    assert repeated.value == pytest.approx(alone.value)
    assert repeated.error == pytest.approx(alone.error)


def test_one_document_has_no_error(quality):
    assert math.isnan(increase(quality, [0.1, 0.2], [0, 0]).error)


def test_windows_are_whole_and_come_from_documents_by_turns(quality, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [list(range(10)), [20, 21], list(range(30, 37))]
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    windows = quality.evaluation_windows(str(file), None, rows=4, length=3)
    assert windows.ids.tolist() == [[0, 1, 2], [30, 31, 32], [3, 4, 5], [33, 34, 35]]
    assert windows.document.tolist() == [0, 1, 0, 1]
