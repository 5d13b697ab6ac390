# Licensed under the Apache License, Version 2.0
"""The packed module by itself, against a sum over atomic experts written out; then what models do with it."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from optimum_heapr import HeaprConfig, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.modeling import atomic_experts, operations
from optimum_heapr.modeling.atomic_experts import AtomicExperts, storage_order
from optimum_heapr.surgery.apply import apply_plan
from optimum_heapr.surgery.selection import cut_block
from tests.helpers import calibration_data, random_ids, tiny_model


FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")  # gpt_oss: transposed, interleaved, biases, its own gate function
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
WIDTHS = {
    "different": [5, 1, 12, 3, 7, 2],
    "groups": [8, 4, 8, 4, 8, 4],
    "equal": [8, 8, 8, 8, 8, 8],
    "empty experts": [4, 0, 12, 4, 0, 3],
    "one expert": [0, 0, 5, 0, 0, 0],
    "nothing": [0, 0, 0, 0, 0, 0],
    "everything": [12, 12, 12, 12, 12, 12],
}


@functools.cache
def block_of(model_type: str, dtype=torch.float32):
    """Only to be read: tests share it."""
    return find_expert_blocks(tiny_model(model_type, dtype=dtype))[0]


def kept_of(widths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(12, generator=generator)[:width].sort().values for width in widths]


def routed(tokens: int = 30, experts: int = 6, top_k: int = 2, dtype=torch.float32, avoid: tuple = ()):
    """Hidden states, chosen experts and router weights; `avoid` are experts that get no token."""
    generator = torch.Generator().manual_seed(1)
    chances = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    chances[:, list(avoid)] = -1
    weights, index = chances.topk(top_k)
    hidden = torch.randn(tokens, 32, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), index, weights.to(dtype)


def explicit_sum(block, kept, hidden, index, weights):
    """Token by token, atomic expert by atomic expert, from the stock weights."""
    output = torch.zeros_like(hidden)
    stock = block.module
    for token in range(hidden.shape[0]):
        for expert, weight in zip(index[token].tolist(), weights[token]):
            total = torch.zeros_like(hidden[token])
            for k in kept[expert].tolist():
                gate, up = block.gate_up_rows(expert)[:, k] @ hidden[token]
                if stock.has_bias:
                    gate, up = torch.stack([gate, up]) + block.gate_up_bias(expert)[:, k]
                activation = stock._apply_gate(torch.stack([gate, up]))  # one pair: the same in both storage orders
                total = total + activation * block.down_rows(expert)[k]
            if stock.has_bias:
                total = total + stock.down_proj_bias[expert]
            output[token] += weight * total
    return output


def use(experts: AtomicExperts, implementation: str) -> AtomicExperts:
    experts.config._experts_implementation = implementation
    return experts


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_computes_the_sum_over_kept_atomic_experts(model_type, name):
    block = block_of(model_type, torch.float64)
    kept, inputs = kept_of(WIDTHS[name]), routed(12, dtype=torch.float64)
    expected = explicit_sum(block, kept, *inputs)
    if name != "nothing" or model_type == "gpt_oss":  # whose biases stay
        assert expected.abs().max() > 1e-2
    for implementation in ("eager", "batched_mm"):
        actual = use(cut_block(block, kept), implementation)(*inputs)
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("rows_at_once", [1, 12, 1024])
@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_the_loop_may_take_experts_alone_or_together(model_type, name, rows_at_once, monkeypatch):
    """30 tokens with 2 experts each: every expert alone, a few at a time, and all at once."""
    block, kept = block_of(model_type), kept_of(WIDTHS[name])
    inputs = routed(avoid=(4,))
    monkeypatch.setattr(atomic_experts, "ROWS_AT_ONCE", rows_at_once)
    actual = use(cut_block(block, kept), "eager")(*inputs)
    torch.testing.assert_close(actual, explicit_sum(block, kept, *inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("avoid", [(), (0, 2), (1, 2, 3, 5)], ids=["all reached", "some unreached", "two reached"])
@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_implementations_agree(model_type, name, avoid):
    """Outputs, and gradients of the inputs, the router weights and all parameters."""
    block = block_of(model_type)
    results = {}
    for implementation in IMPLEMENTATIONS:
        experts = use(cut_block(block, kept_of(WIDTHS[name])), implementation)
        hidden, index, weights = routed(avoid=avoid)
        hidden.requires_grad_(), weights.requires_grad_()
        output = experts(hidden, index, weights)
        wanted = [hidden, weights, *experts.parameters()]
        results[implementation] = [output]
        if output.requires_grad:
            output.square().sum().backward()
            results[implementation] += [torch.zeros_like(t) if t.grad is None else t.grad for t in wanted]
    for implementation in IMPLEMENTATIONS[1:]:
        assert len(results[implementation]) == len(results["eager"])
        for actual, expected in zip(results[implementation], results["eager"]):
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_grouped_products_are_used_where_widths_allow(monkeypatch):
    calls = []
    real = operations._grouped_mm
    monkeypatch.setattr(operations, "_grouped_mm", lambda *args, **kw: calls.append(0) or real(*args, **kw))
    block = block_of("qwen3_moe")
    products = {}
    for name, widths in WIDTHS.items():
        calls.clear()
        use(cut_block(block, kept_of(widths)), "grouped_mm")(*routed())
        products[name] = len(calls)
    assert products["equal"] == 2 and products["groups"] == 4  # up and down of each distinct width
    assert products["different"] == products["nothing"] == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_kept_rows(implementation):
    block = block_of("qwen3_moe")
    kept = kept_of(WIDTHS["empty experts"])
    experts = use(cut_block(block, kept), implementation)
    hidden, index, weights = routed()
    experts(hidden, index, weights).square().sum().backward()

    stock = copy.deepcopy(block.module)
    stock.config._experts_implementation = "eager"
    with torch.no_grad():
        for expert, indices in enumerate(kept):
            removed = torch.ones(12, dtype=torch.bool)
            removed[indices] = False
            stock.down_proj[expert][:, removed] = 0
    stock(hidden, index, weights).square().sum().backward()

    start = 0
    for expert in experts.order:
        end = start + len(kept[expert])
        torch.testing.assert_close(
            experts.down_proj.grad[start:end], stock.down_proj.grad[expert].T[kept[expert]], atol=1e-4, rtol=1e-4
        )
        expected = stock.gate_up_proj.grad[expert].unflatten(0, (2, 12))[:, kept[expert]].flatten(0, 1)
        torch.testing.assert_close(experts.gate_up_proj.grad[2 * start : 2 * end], expected, atol=1e-4, rtol=1e-4)
        start = end


def test_experts_of_equal_width_are_neighbours():
    assert storage_order([3, 0, 5, 3, 0, 5]) == [2, 5, 0, 3, 1, 4]
    assert storage_order([2, 2, 2]) == [0, 1, 2] and storage_order([]) == []
    experts = cut_block(block_of("qwen3_moe"), kept_of([3, 0, 5, 3, 0, 5]))
    assert list(experts.groups()) == [(0, 2, 5), (2, 2, 3), (4, 2, 0)]


def test_shapes_and_description():
    experts = cut_block(block_of("gpt_oss"), kept_of(WIDTHS["different"]))
    assert {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()} == {
        "gate_up_proj": (60, 32),
        "down_proj": (30, 32),
        "gate_up_proj_bias": (60,),
        "down_proj_bias": (6, 32),
    }
    assert "experts=6, widths=1..12, total=30" in repr(experts)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision(implementation):
    block = block_of("qwen3_moe", torch.bfloat16)
    kept = kept_of([8, 8, 8, 5, 5, 0])
    hidden, index, weights = routed(dtype=torch.bfloat16)
    expected = explicit_sum(block_of("qwen3_moe", torch.float64), kept, hidden.double(), index, weights.double())
    for router_weights in (weights, weights.float()):  # families differ
        output = use(cut_block(block, kept), implementation)(hidden, index, router_weights)
        assert output.dtype == torch.bfloat16
        assert (output.double() - expected).norm() < 0.02 * expected.norm()


def results_of(
    experts, run, frozen: tuple = (), dtype=torch.float32, device: str = "cpu"
) -> list[torch.Tensor | None]:
    """Output, and gradients of the inputs and parameters."""
    inputs = dict(zip(("hidden", "index", "weights"), routed(avoid=(4,), dtype=dtype)))
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    wanted = {**inputs, **dict(experts.named_parameters())}
    wanted.pop("index")
    experts.zero_grad()
    for name, tensor in wanted.items():
        tensor.requires_grad_(name not in frozen)
    output = run(*inputs.values())
    output.square().sum().backward()
    return [output.detach(), *(tensor.grad for tensor in wanted.values())]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "model_type, name", [("gpt_oss", "different"), ("qwen3_moe", "groups"), ("qwen3_moe", "equal")]
)
def test_forward_and_backward_on_a_device(model_type, name, implementation, dtype, tolerance, device):
    exact = use(cut_block(block_of(model_type, torch.float64), kept_of(WIDTHS[name])), "eager")
    expected = results_of(exact, exact, dtype=torch.float64)
    experts = use(cut_block(block_of(model_type, dtype), kept_of(WIDTHS[name])).to(device), implementation)
    for one, other in zip(results_of(experts, experts, dtype=dtype, device=device), expected, strict=True):
        assert one.dtype == dtype and (one.cpu() - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast(implementation):
    """Weights and hidden states in float32, products in bfloat16: how mixed-precision training runs."""
    block, kept = block_of("gpt_oss"), kept_of([8, 8, 8, 5, 5, 0])
    hidden, index, weights = routed()
    experts = use(cut_block(block, kept), implementation)
    expected = experts(hidden, index, weights)
    with torch.autocast("cpu", torch.bfloat16):
        output = experts(hidden.requires_grad_(), index, weights)
    assert output.dtype == torch.float32
    assert 0 < (output - expected).norm() < 0.02 * expected.norm()
    output.sum().backward()
    assert hidden.grad.isfinite().all() and experts.down_proj.grad.isfinite().all()


def test_copies_are_independent():
    experts = use(cut_block(block_of("qwen3_moe"), kept_of(WIDTHS["different"])), "eager")
    inputs = routed()
    with torch.inference_mode():
        expected = experts(*inputs)  # what is remembered of the first call must serve training, too
    for twin in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(twin(*inputs), expected)
        nn.init.zeros_(twin.down_proj)
        twin(*inputs).sum().backward()
    assert torch.equal(experts(*inputs), expected)


def pruned_model(model_type: str, **changes) -> nn.Module:
    model = tiny_model(model_type, **changes)
    plan = PruningPlan.build(calibrate(model, calibration_data(24, 24)), HeaprConfig(ratio=0.4))
    first = next(iter(plan.kept))
    plan.kept[first][1] = torch.empty(0, dtype=torch.int64)
    return apply_plan(model, plan)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2"])
def test_generation_with_cache_equals_without(model_type):
    model = pruned_model(model_type)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    results = [
        model.generate(
            random_ids(2, 5), use_cache=use_cache, output_scores=True, return_dict_in_generate=True, **options
        )
        for use_cache in (True, False)
    ]
    assert results[0].sequences.shape == (2, 17)
    assert torch.equal(results[0].sequences, results[1].sequences)
    torch.testing.assert_close(torch.stack(results[0].scores), torch.stack(results[1].scores), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_gradients_with_checkpointing_equal_those_without(implementation, use_reentrant):
    model = pruned_model("qwen2_moe").train()
    model.set_experts_implementation(implementation)
    ids = random_ids()

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls = []
    for module in model.modules():
        if isinstance(module, AtomicExperts):
            module.register_forward_hook(lambda *args: calls.append(0))
    actual = gradients()
    assert len(calls) == 4  # two blocks, each a second time in the backward
    assert any("experts" in name and gradient.abs().sum() > 0 for name, gradient in expected.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-7, rtol=1e-5)


def test_set_experts_implementation_switches_the_forward(monkeypatch):
    used = []
    mapping = atomic_experts.AtomicExpertsInterface._global_mapping

    def watched(name, function):
        return lambda *args: used.append(name) or function(*args)

    for name in ("grouped_mm", "batched_mm"):
        monkeypatch.setitem(mapping, name, watched(name, mapping[name]))
    eager = watched("eager", atomic_experts.eager_atomic_experts_forward)
    monkeypatch.setattr(atomic_experts, "eager_atomic_experts_forward", eager)
    model = pruned_model("qwen3_moe")
    outputs = {}
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        used.clear()
        with torch.no_grad():
            outputs[implementation] = model(input_ids=random_ids()).logits
        assert used == [implementation] * 2 and implementation in model.get_experts_implementation().values()
    for implementation in IMPLEMENTATIONS[1:]:
        torch.testing.assert_close(outputs[implementation], outputs["eager"], atol=1e-5, rtol=1e-5)
