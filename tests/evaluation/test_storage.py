# Licensed under the Apache License, Version 2.0
"""Bytes by type against counts made from shapes, and for tensors that hold several."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from optimum_heapr.evaluation.size import ModelSize, routed_experts
from optimum_heapr.evaluation.storage import StoredWeights
from optimum_heapr.surgery.linear import to_linear_experts
from tests.evaluation.test_size import pruned
from tests.helpers import tiny_model


def test_bytes_are_those_of_the_parameters():
    model = tiny_model("deepseek_v2").to(torch.bfloat16)
    found, blocks = StoredWeights.of(model), routed_experts(model)
    each = sum(block.parameters_each * sum(block.widths) for block in blocks.values())
    assert found.experts == {"bfloat16": 2 * each}
    buffers = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if n in model.state_dict())
    assert sum(found.weights.values()) == ModelSize.of(model).weight_bytes + buffers


def test_tied_weights_count_once():
    tied = tiny_model(tie_word_embeddings=True)
    assert sum(StoredWeights.of(tied).weights.values()) == ModelSize.of(tied).weight_bytes


def test_dense_models_have_no_experts():
    assert StoredWeights.of(tiny_model("llama")).experts == {}


def test_an_expert_in_fewer_bits_is_seen_in_either_form_of_experts():
    model = pruned(tiny_model())
    before = StoredWeights.of(model).experts
    assert set(before) == {"float32"}
    layer = to_linear_experts(model).model.layers[0].mlp.experts[0].gate_proj
    assert StoredWeights.of(model).experts == before
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    count = layer.weight.numel()
    assert StoredWeights.of(model).experts == {"float32": before["float32"] - 4 * count, "int8": count}


def test_a_tensor_that_holds_several_counts_for_what_it_holds():
    model = pruned(tiny_model())
    layer = to_linear_experts(model).model.layers[0].mlp.experts[0].gate_proj
    before, shape = StoredWeights.of(model).experts, layer.weight.shape
    layer.weight = nn.Parameter(TwoTensor(torch.ones(shape), torch.ones(shape)), requires_grad=False)
    assert StoredWeights.of(model).experts == {"float32": before["float32"] + 4 * shape.numel()}


ADAPTERS = {
    "linear": {"target_modules": ["gate_proj", "q_proj"]},
    "packed": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
    "stock": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
}


@pytest.mark.parametrize("form", ADAPTERS)
@pytest.mark.filterwarnings("ignore:adapters of packed experts")
def test_adapters_count_where_they_are(form):
    model = tiny_model() if form == "stock" else pruned(tiny_model())
    if form == "linear":
        to_linear_experts(model)
    before = StoredWeights.of(model)
    with_adapters = get_peft_model(model, LoraConfig(r=2, **ADAPTERS[form]))
    held = {name: 4 * parameter.numel() for name, parameter in with_adapters.named_parameters() if "lora_" in name}
    of_experts = sum(size for name, size in held.items() if ".experts." in name)
    assert 0 < of_experts < sum(held.values())
    for found in (StoredWeights.of(with_adapters), StoredWeights.of(model)):
        assert found.experts == {"float32": before.experts["float32"] + of_experts}
        assert found.weights == {"float32": before.weights["float32"] + sum(held.values())}
