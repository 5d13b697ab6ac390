# Licensed under the Apache License, Version 2.0
"""`torch.compile`: one graph, with gradients and without, which computes what runs without it."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from optimum_heapr.modeling import half_precision, operations
from optimum_heapr.surgery.apply import apply_plan
from optimum_heapr.surgery.linear import to_linear_experts
from tests.helpers import random_ids, tiny_model
from tests.modeling.test_atomic_experts import (
    IMPLEMENTATIONS,
    WIDTHS,
    block_of,
    cut_block,
    kept_of,
    results_of,
    routed,
    use,
)
from tests.processes import run_python
from tests.surgery.stock_models import random_plan


def compile_whole(module, backend: str = "aot_eager"):
    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True)


def assert_rounded_alike(actual, expected):
    """Sums of a few dozen terms as large as the largest entry, in another order."""
    atol = 32 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_a_model_without_gradients():
    model = tiny_pruned("qwen3_moe", num_hidden_layers=1)
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
    model = tiny_pruned(model_type, num_hidden_layers=1).train()
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
@pytest.mark.parametrize(
    "model_type, name",
    [("gpt_oss", "different"), ("gpt_oss", "groups"), ("gpt_oss", "empty experts"), ("qwen3_moe", "different")],
)
def test_gradients_are_those_without_compiling(model_type, name, implementation):
    experts = use(cut_block(block_of(model_type), kept_of(WIDTHS[name])), implementation)
    expected = results_of(experts, experts)
    actual = results_of(experts, compile_whole(experts))
    assert len(expected) == (7 if model_type == "gpt_oss" else 5)
    for one, other in zip(actual, expected):
        assert_rounded_alike(one, other)


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
@pytest.mark.parametrize("products", [True, False])
def test_half_precision(products, model_type, widths, implementation, monkeypatch):
    """Whether or not the CPU has products of it."""
    monkeypatch.setattr(half_precision, "_has_products", lambda dtype: products or dtype != torch.bfloat16)
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
        assert 1e-4 * third.norm() < (one - third).norm() < 1.5 * (other - third).norm()


def test_weights_are_taken_as_they_are_at_the_call():
    """Adapters put a sum in the place of a parameter while the model runs, and quantizers what they restore."""

    class Doubled(nn.Module):
        def forward(self, stored):
            return 2 * stored

    experts = use(cut_block(block_of("qwen3_moe"), kept_of(WIDTHS["different"])), "eager")
    inputs = routed()
    with torch.no_grad():
        unchanged = experts(*inputs)
        parametrize.register_parametrization(experts, "gate_up_proj", Doubled())
        expected, actual = experts(*inputs), compile_whole(experts)(*inputs)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(actual, unchanged)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("step", [0, 3])
def test_operations_are_one_anothers_gradients(parts, grouped, step):
    """And of the gradients in turn. Against differences, in float64, with an expert of width 0 and one without tokens."""
    generator = torch.Generator().manual_seed(0)
    widths, counts = [4, 2, 2, 1, 0], [3, 0, 2, 4, 1]
    tokens = torch.randint(0, 5, (10,), generator=generator)
    ends = torch.tensor(counts).cumsum(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    weight, options = random(parts * 9, 3), (widths, parts, grouped, step)
    like = torch.zeros(5, 3, dtype=torch.float64)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, w: operations.expand(x, tokens, ends, w, *options), (random(5, 3), weight))
        assert check(
            lambda a, w: operations.reduce(a, tokens, ends, w, like, *options), (random(10, parts * 4), weight)
        )
    if step:
        torch.library.opcheck(torch.ops.heapr.expand.default, (random(5, 3), tokens, ends, weight, *options))


def test_a_step_is_not_compiled_again():
    """Whatever experts the tokens go to."""
    experts = use(cut_block(block_of("qwen3_moe"), kept_of(WIDTHS["different"])), "eager")
    run = compile_whole(experts)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for avoid in ((), (0, 2), (1, 2, 3, 5)):
            hidden, index, weights = routed(avoid=avoid)
            torch.testing.assert_close(
                run(hidden, index, weights), experts(hidden, index, weights), atol=1e-5, rtol=1e-5
            )


def test_adapters_on_experts_train():
    """LoRA of PEFT on the packed parameters, whose class it changes in each call."""

    class Block(nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.experts = experts

        def forward(self, *inputs):
            return self.experts(*inputs)

    block = Block(use(cut_block(block_of("qwen3_moe"), kept_of(WIDTHS["empty experts"])), "eager"))
    names = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = get_peft_model(block, LoraConfig(r=2, target_modules=[], target_parameters=names))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # they start as zeros
                nn.init.normal_(parameter, std=0.1)
    inputs = routed()

    def gradients(run):
        adapted.zero_grad()
        run(*inputs).square().sum().backward()
        return {n: p.grad.clone() for n, p in adapted.named_parameters() if p.requires_grad}

    expected = gradients(adapted)
    torch._dynamo.reset()
    run = torch.compile(adapted, backend="aot_eager")
    assert len(expected) == 4 and all(gradient.abs().sum() > 0 for gradient in expected.values())
    for _ in range(2):
        for name, gradient in gradients(run).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "model_type, dtype, tolerance", [("qwen3_moe", torch.float32, 1e-5), ("gpt_oss", torch.bfloat16, 0.05)]
)
def test_an_exported_program_stands_alone(model_type, dtype, tolerance, tmp_path):
    """Without the model, beside another one, and in a process of its own, which knows the operations alone."""
    model, other = (tiny_pruned(model_type, widths, num_hidden_layers=1).to(dtype) for widths in ((5, 7), (3, 9)))
    ids = random_ids(2, 16)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        program = torch.export.export(
            model,
            (),
            {"input_ids": ids, "use_cache": False},
            dynamic_shapes={"input_ids": {1: torch.export.Dim("length", min=2, max=64)}, "use_cache": None},
        )
        del model
        other = other(input_ids=ids, use_cache=False).logits
        actual = program.module()(input_ids=ids, use_cache=False).logits
        shorter = program.module()(input_ids=ids[:, :9], use_cache=False).logits
    assert (actual - expected).norm() <= tolerance * expected.norm() < (other - expected).norm()
    torch.testing.assert_close(shorter, actual[:, :9], atol=tolerance, rtol=tolerance)

    torch.export.save(program, tmp_path / "program.pt2")
    torch.save({"ids": ids, "logits": actual}, tmp_path / "results.pt")
    code = f"""
import torch, transformers.cache_utils
import optimum_heapr.modeling.operations
results = torch.load({str(tmp_path / "results.pt")!r})
program = torch.export.load({str(tmp_path / "program.pt2")!r}).module()
with torch.no_grad():
    logits = program(input_ids=results["ids"], use_cache=False).logits
assert (logits - results["logits"]).norm() <= {tolerance} * results["logits"].norm()
print("the same")
"""
    done = run_python(code, has="libraries")
    assert done.stdout.strip() == "the same", done.stderr


def test_programs_of_linear_experts_are_of_ordinary_operations():
    """As other runtimes have them, with an empty expert; `test_exporters.py` goes on to those."""
    model = to_linear_experts(tiny_pruned("qwen3_moe", (0, 7), num_hidden_layers=1))
    ids, sizes = random_ids(2, 16), {"input_ids": {1: torch.export.Dim("length", min=2, max=64)}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=sizes)
        for some in (ids, ids[:, :9]):
            found = program.module()(input_ids=some, use_cache=False).logits
            torch.testing.assert_close(found, model(input_ids=some).logits, atol=1e-5, rtol=1e-5)
    calls = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {call.namespace for call in calls if isinstance(call, torch._ops.OpOverload)} == {"aten"}


def test_a_program_has_no_nans_of_experts_that_a_token_did_not_choose():
    """Where every expert computes all tokens, one may overflow for tokens that it never gets: infinite times 0."""
    experts = to_linear_experts(tiny_pruned("qwen3_moe", (5, 7), num_hidden_layers=1)).model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in experts[3].values():
            layer.weight.mul_(1e30)
        hidden = torch.randn(6, experts.hidden_size, generator=generator)
        given = hidden, torch.tensor([[1, 2]] * 6), torch.rand(6, 2, generator=generator)
        found = torch.export.export(experts, given).module()(*given)
        assert experts[3]["up_proj"](hidden).abs().max() > 1e20
        torch.testing.assert_close(found, experts(*given), atol=1e-6, rtol=1e-5)


def tiny_pruned(model_type: str, widths: tuple[int, int] = (5, 7), **changes):
    """A model whose first experts are empty, and others of these widths."""
    model = tiny_model(model_type, **changes)
    plan = random_plan(model)
    for kept in plan.kept.values():
        kept[:] = [torch.arange(widths[expert % 2] if expert else 0) for expert in range(len(kept))]
    return apply_plan(model, plan)
