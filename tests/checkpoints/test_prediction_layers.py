# Licensed under the Apache License, Version 2.0
"""Layers for multi-token prediction are left out, no longer announced, and named where people look."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_heapr.checkpoints.prediction_layers import prefix_of
from tests.checkpoints.test_cutting import both_ways
from tests.surgery.stock_models import wide_model


@pytest.mark.parametrize(
    ("family", "field", "prefix", "layout"),
    [
        ("deepseek_v3", "num_nextn_predict_layers", "model.layers.61.", "uniform"),  # which the class knows of
        ("deepseek_v3", "num_nextn_predict_layers", "model.layers.9.", "variable"),
        ("qwen3_next", "mtp_num_hidden_layers", "mtp.", "uniform"),
    ],
)
def test_they_are_left_out_and_no_longer_announced(family, field, prefix, layout, tmp_path, heapr_log):
    wide_model(family).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    added = {f"{prefix}enorm.weight": torch.ones(3), f"{prefix}eh_proj.weight": torch.ones(2, 2)}
    save_file({**load_file(path), **added}, path, {"format": "pt"})
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: 1}))

    both_ways(tmp_path / "source", tmp_path, layout=layout)
    for folder in (tmp_path / "memory", tmp_path / "stream"):
        assert json.loads((folder / "config.json").read_text())[field] == 0
        assert not any(name.startswith(prefix) for name in load_file(folder / "model.safetensors"))
        said = f"2 tensors of layers for multi-token prediction ({prefix}*) are not carried over; {field} is 0 now"
        assert said in json.loads((folder / "heapr" / "report.json").read_text())["problems"]
        assert said in (folder / "README.md").read_text()
    warned = {id(record) for record in heapr_log.records if said in record.getMessage()}
    assert len(warned) == 2  # once for each way


def test_which_names_are_of_prediction_layers():
    assert prefix_of("model.language_model.layers.4.mlp.gate.weight", 4) == "model.language_model.layers.4.*"
    assert prefix_of("model.mtp.layers.0.norm.weight", 4) == "model.mtp.*"
    assert prefix_of("model.layers.3.mlp.gate.weight", 4) is None
    assert prefix_of("lm_head.weight", 4) is None
