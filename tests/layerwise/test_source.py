# Licensed under the Apache License, Version 2.0
"""Parameters that are made from a checkpoint piece by piece are those of the loaded model."""

import pytest
import torch

from optimum_heapr.checkpoints.loading import load_model, source_of
from tests.helpers import tiny_model


@pytest.mark.parametrize("num_experts", [1, 2])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])  # an expert a tensor, and all experts in one
def test_an_expert_is_read_alone_however_many_there_are(model_type, num_experts, tmp_path):
    name = "num_local_experts" if model_type == "gpt_oss" else "num_experts"
    model = tiny_model(model_type, **{name: num_experts, "num_experts_per_tok": 1})
    model.save_pretrained(tmp_path)
    source = source_of(load_model(tmp_path, skeleton=True)[0])
    for block in source.blocks:
        for part in ("gate_up_proj", "down_proj"):
            expected = model.get_parameter(f"{block.path}.{part}")
            for expert in range(num_experts):
                found = source.parameter(f"{block.path}.{part}", expert)
                assert torch.equal(found, expected[expert : expert + 1])
