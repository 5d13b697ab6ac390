# Licensed under the Apache License, Version 2.0
"""`torch.compile`: one graph, with gradients and without, which computes what runs without it."""

import copy

import pytest
import torch

from optimum_heapr.modeling import compiled
from tests.helpers import random_ids
from tests.modeling.test_atomic_experts import (
    FAMILIES,
    IMPLEMENTATIONS,
    WIDTHS,
    block_of,
    cut_block,
    kept_of,
    pruned_model,
    results_of,
    routed,
    use,
)


def compile_whole(module, backend: str = "aot_eager"):
    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True)


def test_a_model_without_gradients():
    model = pruned_model("qwen3_moe")
    twin = copy.deepcopy(model)  # must not run the blocks of the first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        expected = twin(input_ids=random_ids(), use_cache=False).logits
        actual = compile_whole(twin)(input_ids=random_ids(), use_cache=False).logits
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type, checkpointing", [("qwen3_moe", True), ("gpt_oss", False)])
def test_a_model_in_training(model_type, checkpointing):
    model = pruned_model(model_type).train()
    model.set_experts_implementation("grouped_mm")
    ids = random_ids()

    def gradients(run):
        model.zero_grad()
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    actual = gradients(compile_whole(model))
    assert any("experts" in name and gradient.abs().sum() > 0 for name, gradient in expected.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["different", "groups", "empty experts"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_are_those_without_compiling(model_type, name, implementation):
    experts = use(cut_block(block_of(model_type), kept_of(WIDTHS[name])), implementation)
    expected = results_of(experts, experts)
    actual = results_of(experts, compile_whole(experts))
    assert len(expected) == (7 if model_type == "gpt_oss" else 5)
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "frozen", [("gate_up_proj", "down_proj"), ("hidden", "weights"), ("hidden", "weights", "gate_up_proj")]
)
def test_frozen_tensors_get_no_gradient(frozen):
    """As in the training of adapters, nothing is computed for what is not trained."""
    experts = use(cut_block(block_of("qwen3_moe"), kept_of(WIDTHS["different"])), "eager")
    expected = results_of(experts, experts, frozen)
    actual = results_of(experts, compile_whole(experts), frozen)
    assert [gradient is None for gradient in actual[1:]] == [
        name in frozen for name in ("hidden", "weights", "gate_up_proj", "down_proj")
    ]
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("model_type, widths", [("gpt_oss", "different"), ("qwen3_moe", "equal")])
def test_half_precision(model_type, widths, implementation):
    experts = use(cut_block(block_of(model_type, torch.bfloat16), kept_of(WIDTHS[widths])), implementation)
    exact = use(cut_block(block_of(model_type, torch.float64), kept_of(WIDTHS[widths])), "eager")
    expected = results_of(exact, exact, dtype=torch.float64)
    for run in (experts, compile_whole(experts)):
        for one, other in zip(results_of(experts, run, dtype=torch.bfloat16), expected):
            assert one.dtype == torch.bfloat16 and (one - other).norm() < 0.03 * other.norm()


def test_autocast():
    """Products are in bfloat16, forward and backward, as they are without compiling."""
    experts = use(cut_block(block_of("qwen3_moe"), kept_of(WIDTHS["different"])), "eager")

    def under_autocast(run):
        def call(*inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return run(*inputs)

        return call

    exact = results_of(experts, experts)
    expected = results_of(experts, under_autocast(experts))
    actual = results_of(experts, under_autocast(compile_whole(experts)))
    for one, other, third in zip(actual, expected, exact):
        assert one.dtype == torch.float32 and (other - third).norm() > 1e-4 * third.norm()
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_parameters_are_taken_as_they_are_at_the_call():
    """Adapters put a sum in the place of a parameter while the model runs."""
    experts = use(cut_block(block_of("qwen3_moe"), kept_of(WIDTHS["different"])), "eager")
    hidden, index, weights = routed()
    doubled = [2 * experts.gate_up_proj.detach(), experts.down_proj.detach()]
    actual = compiled._operation(hidden, index, weights, doubled, experts.number, None)
    with torch.no_grad():
        unchanged = experts(hidden, index, weights)
        experts.gate_up_proj.mul_(2)
        expected = experts(hidden, index, weights)
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual, unchanged)
