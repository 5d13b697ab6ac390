# Licensed under the Apache License, Version 2.0
"""Finding expert blocks in models of several families, reading single atomic experts, and refusing the rest by name."""

import pytest
import torch
import torch.nn.functional as F

from optimum_heapr.experts import (
    experts_of_any_width,
    find_expert_blocks,
    model_name,
    refusal_reason,
    stack_gate_and_up,
)
from optimum_heapr.utils.errors import HeaprError
from tests.helpers import random_ids, tiny_model


FAMILIES = ["qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_blocks_are_found_in_the_order_of_the_layers(model_type):
    model = tiny_model(model_type, num_hidden_layers=12)
    blocks = find_expert_blocks(model)
    first = 1 if model_type == "deepseek_v2" else 0  # its first layer is dense
    assert [block.path for block in blocks] == [f"model.layers.{layer}.mlp.experts" for layer in range(first, 12)]
    for block in blocks:
        assert model.get_submodule(block.path) is block.module
        assert (block.num_experts, block.width, block.hidden_size) == (6, 12, 32)


def test_width_and_hidden_size_are_not_mixed_up():
    """Where an expert is wider than the model, and where the two are equal."""
    for model_type, width in (("gpt_oss", 40), ("qwen3_moe", 40), ("gpt_oss", 32), ("qwen3_moe", 32)):
        name = "intermediate_size" if model_type == "gpt_oss" else "moe_intermediate_size"
        block = find_expert_blocks(tiny_model(model_type, **{name: width}))[0]
        assert (block.width, block.hidden_size) == (width, 32)
        assert block.gate_up_rows(0).shape == (2, width, 32) and block.down_rows(0).shape == (width, 32)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_expert_is_the_sum_of_its_atomic_experts(model_type):
    """Rebuilt from single rows, one atomic expert after another, against the module itself."""
    model = tiny_model(model_type, dtype=torch.float64)
    block = find_expert_blocks(model)[-1]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for expert in (0, 5):
        total = torch.zeros(5, 32, dtype=torch.float64)
        rows, columns, bias = block.gate_up_rows(expert), block.down_rows(expert), block.gate_up_bias(expert)
        assert (bias is not None) == (model_type == "gpt_oss")
        for atom in range(block.width):
            gate, up = (x @ rows[part, atom] + (bias[part, atom] if bias is not None else 0) for part in (0, 1))
            if model_type == "gpt_oss":
                h = (up.clamp(-7, 7) + 1) * gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7))
            else:
                h = F.silu(gate) * up
            total += h[:, None] * columns[atom]
        if model_type == "gpt_oss":
            total += block.module.down_proj_bias[expert]
        index = torch.full((5, 1), expert)
        torch.testing.assert_close(block.module(x, index, torch.ones(5, 1, dtype=torch.float64)), total)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_norms_are_those_of_the_three_rows(model_type):
    block = find_expert_blocks(tiny_model(model_type, dtype=torch.bfloat16))[0]
    norms = block.atomic_norms()
    assert norms.shape == (6, 12) and norms.dtype == torch.float32 and not norms.requires_grad
    for expert, atom in ((0, 0), (2, 5), (5, 11)):
        gate, up = block.gate_up_rows(expert)[:, atom].float()
        rows = torch.cat([gate, up, block.down_rows(expert)[atom].float()])
        torch.testing.assert_close(norms[expert, atom], rows.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_concatenated", [True, False])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_stacking_undoes_the_split(model_type, is_concatenated):
    block = find_expert_blocks(tiny_model(model_type))[0]
    stored = block.module.gate_up_proj[3]
    stored = stored.T if block.module.is_transposed else stored
    assert torch.equal(stack_gate_and_up(block.gate_up_rows(3), block.module.is_concatenated), stored)
    rows = torch.arange(12).view(2, 3, 2)
    expected = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11] if is_concatenated else [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert stack_gate_and_up(rows, is_concatenated).flatten().tolist() == expected


# What is refused


def test_a_dense_model_is_refused_by_name():
    with pytest.raises(HeaprError) as error:
        find_expert_blocks(tiny_model("llama"))
    assert str(error.value) == (
        "model='LlamaForCausalLM' (model_type 'llama'): has no routed experts on the experts interface of transformers; "
        "name a Mixture-of-Experts model such as qwen3_moe or mixtral"
    )


def test_a_pruned_model_is_refused():
    model = tiny_model()
    model.config.expert_widths = {"model.layers.0.mlp.experts": [1, 2]}
    with pytest.raises(HeaprError, match="was pruned already; start from the unpruned model"):
        find_expert_blocks(model)


def test_a_model_is_called_what_it_was_loaded_from():
    model = tiny_model()
    assert model_name(model) == "Qwen3MoeForCausalLM"
    model.config._name_or_path = "someone/some-model"
    assert model_name(model) == "someone/some-model"
    model.config.expert_widths = {}
    with pytest.raises(HeaprError, match="model='someone/some-model'"):
        find_expert_blocks(model)


def flag(name, value):
    return lambda module: setattr(module, name, value)


def foreign_parameter(module):
    module.post_norm = torch.nn.Parameter(torch.ones(3))


def missing_parameter(module):
    module.up_proj = module.gate_up_proj
    del module.gate_up_proj


def quantized(module):
    module.down_proj = torch.nn.Parameter(module.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)


REFUSED = {
    "no gate": (flag("has_gate", False), "its experts have no gate projection"),
    "a norm": (flag("has_post_expert_norm", True), "a norm follows each expert"),
    "expert parallel": (
        flag("_is_expert_parallel", True),
        "its experts are spread over processes by expert parallelism; load it without",
    ),
    "a foreign parameter": (foreign_parameter, "its parameters are down_proj, gate_up_proj, post_norm; expected"),
    "a missing parameter": (missing_parameter, "its parameters are down_proj, up_proj; expected gate_up_proj and"),
    "quantized": (quantized, "its weights are quantized; load it dequantized, in bfloat16"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_experts_that_cannot_be_cut_exactly_are_refused_with_the_reason(change, reason):
    model = tiny_model()
    experts = model.model.layers[1].mlp.experts
    assert refusal_reason(experts) is None
    change(experts)
    assert reason in refusal_reason(experts)
    expected = (
        r"model='Qwen3MoeForCausalLM': model\.layers\.1\.mlp\.experts \(Qwen3MoeExperts\) cannot be pruned exactly: "
    )
    with pytest.raises(HeaprError, match=expected + reason) as error:
        find_expert_blocks(model)
    assert "\n" not in str(error.value)


def test_an_ungated_family_is_refused():
    """A class of transformers itself, not one with its flag turned."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "nemotron_h",
        vocab_size=64,
        hidden_size=32,
        layers_block_type=["moe", "attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        moe_intermediate_size=8,
        moe_shared_expert_intermediate_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(HeaprError, match="NemotronHExperts.*its experts have no gate projection"):
        find_expert_blocks(model)


# Widths that transformers' default refuses


@pytest.mark.parametrize(
    ("dtype", "width", "given", "used"),
    [
        (torch.float32, 12, "grouped_mm", "grouped_mm"),
        (torch.float32, 9, "grouped_mm", "eager"),
        (torch.float32, 9, "batched_mm", "batched_mm"),  # which takes any
        (torch.bfloat16, 12, "grouped_mm", "eager"),
        (torch.bfloat16, 16, "grouped_mm", "grouped_mm"),
        (torch.float64, 16, "grouped_mm", "eager"),
    ],
)
def test_experts_run_in_a_way_that_takes_their_width(dtype, width, given, used):
    model, ids = tiny_model(dtype=dtype, moe_intermediate_size=width), random_ids(1, 20)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.set_experts_implementation(given)
        with experts_of_any_width(model):
            assert model.config._experts_implementation == used
            found = model(input_ids=ids).logits
    assert model.config._experts_implementation == given
    # Roundings of two layers, of logits of about 1; experts' order of summing differs between the ways.
    torch.testing.assert_close(found, expected, atol=64 * torch.finfo(dtype).eps, rtol=0)
