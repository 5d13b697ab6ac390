# Licensed under the Apache License, Version 2.0
"""Files that are damaged in any way are one line that names them."""

import json

import pytest
import torch

from optimum_heapr import AtomicStatistics, HeaprError, PruningPlan
from optimum_heapr.utils.artefacts import artefact_format, read_artefact, write_artefact
from optimum_heapr.utils.tensor_files import TensorReader
from tests.helpers import random_statistics


def with_header(path, header: str):
    path.write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode())
    return path


HEADERS = {
    "nested too deep": '{"a":' + "[" * 100_000,
    "a list": "[]",
    "a number": "3",
    "no offsets": '{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
    "a dtype that is a list": '{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
    "a shape that is a number": '{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
    "a tensor beyond the end": '{"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}',
    "metadata that is a list": '{"__metadata__": []}',
    "no JSON": "{",
    "nothing": "",
}


@pytest.mark.parametrize("header", HEADERS)
def test_damaged_headers_are_one_line(header, tmp_path):
    path = with_header(tmp_path / "x.safetensors", HEADERS[header])
    reading = [
        lambda: read_artefact(path, "heapr_plan"),
        lambda: AtomicStatistics.load(path),
        lambda: artefact_format(path),
    ]
    for read in reading if header != "a tensor beyond the end" else reading[:2]:
        with pytest.raises(HeaprError, match="x.safetensors") as error:
            read()
        assert "\n" not in str(error.value)
    if header != "metadata that is a list":  # which holds no tensors, and says nothing of them
        with pytest.raises(HeaprError, match="x.safetensors") as error:
            reader = TensorReader([path])
            reader.read("a")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "document", ["[]", "3", '"x"', "{", "[" * 100_000, '{"blocks": 3}'], ids=lambda text: text[:9]
)
@pytest.mark.parametrize("kind", [AtomicStatistics, PruningPlan])
def test_documents_of_another_form_are_one_line(kind, document, tmp_path, monkeypatch):
    name = "heapr_plan" if kind is PruningPlan else "heapr_statistics"
    monkeypatch.setattr(
        json, "dumps", lambda value, dumps=json.dumps, **o: document if value == {} else dumps(value, **o)
    )
    write_artefact(tmp_path / "x.safetensors", name, {"a": torch.ones(1)}, {})
    with pytest.raises(HeaprError, match="x.safetensors"):
        kind.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("count", ["x", None, [3], {}])
def test_a_number_of_tokens_that_is_none_is_one_line(count, tmp_path):
    statistics = random_statistics()
    statistics.fingerprint["data"]["num_tokens"] = count
    statistics.save(tmp_path / "x.safetensors")
    with pytest.raises(HeaprError, match="x.safetensors.*is damaged"):
        AtomicStatistics.load(tmp_path / "x.safetensors")
