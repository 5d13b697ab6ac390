# Licensed under the Apache License, Version 2.0
"""What half precision on a CPU runs instead of the loop; mostly in float64, where it can be told from it."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._library.custom_ops import OPDEFS
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.modeling import atomic_experts, half_precision
from optimum_heapr.modeling.atomic_experts import AtomicExperts
from optimum_heapr.modeling.compiled import traced_forward
from optimum_heapr.surgery.selection import cut_block
from tests.helpers import tiny_model
from tests.modeling.test_atomic_experts import (
    FAMILIES,
    IMPLEMENTATIONS,
    WIDTHS,
    block_of,
    explicit_sum,
    kept_of,
    routed,
    use,
)


@pytest.mark.parametrize("rows_at_once", [5, 1024])
@pytest.mark.parametrize("width_step", [4, 64])
@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_rounded_products_give_the_same_sum(model_type, name, width_step, rows_at_once, monkeypatch):
    """Whatever of the neighbours' rows is computed along: none, some of either side, more than there are."""
    block, kept = block_of(model_type, torch.float64), kept_of(WIDTHS[name])
    inputs = routed(avoid=(4,), dtype=torch.float64)
    monkeypatch.setattr(atomic_experts, "ROWS_AT_ONCE", rows_at_once)
    experts = use(cut_block(block, kept), "eager")
    expected = experts(*inputs)
    experts.width_step = width_step
    actual = half_precision.few_shapes_forward(experts, *inputs)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_all_experts_at_once_give_the_same_sum(model_type, name):
    block, kept = block_of(model_type, torch.float64), kept_of(WIDTHS[name])
    hidden, index, weights = routed(12, avoid=(4,), dtype=torch.float64)
    expected = explicit_sum(block, kept, hidden, index, weights)
    actual = half_precision.all_experts_forward(cut_block(block, kept), hidden, index, weights)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_experts_that_were_not_chosen_do_not_leak():
    """What overflows in an expert is nothing to the tokens that do not go there."""
    experts = cut_block(block_of("qwen3_moe", torch.bfloat16), kept_of(WIDTHS["everything"]))
    inputs = routed(avoid=(4,), dtype=torch.bfloat16)
    expected = half_precision.all_experts_forward(experts, *inputs)
    experts.gate_up_proj[4 * 24 : 5 * 24] = 1e38
    assert torch.equal(half_precision.all_experts_forward(experts, *inputs), expected)
    reached = routed(avoid=(5,), dtype=torch.bfloat16)
    assert not half_precision.all_experts_forward(experts, *reached).isfinite().all()


def say_products(monkeypatch, there: bool) -> None:
    """Whatever this CPU has: that oneDNN has products of half precision, or none."""
    monkeypatch.setattr(
        half_precision, "_has_products", lambda dtype: there or dtype not in (torch.bfloat16, torch.float16)
    )


class Products(TorchDispatchMode):
    """Records the types of the factors of products of matrices, and how many rows the first has."""

    PRODUCTS = tuple(getattr(torch.ops.aten, name) for name in ("mm", "addmm", "matmul", "linear", "_grouped_mm"))

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket in self.PRODUCTS:
            matrices = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.ndim > 1]
            self.seen.add((len(matrices[0]), *(matrix.dtype for matrix in matrices)))
        if operation.namespace == "heapr":  # what an operation of ours does is not seen from outside
            with self:
                return OPDEFS[f"heapr::{operation.overloadpacket.__name__}"]._init_fn(*args, **(kwargs or {}))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_products_that_the_cpu_lacks_are_in_float32(implementation, dtype, autocast, trained, monkeypatch):
    """Forward and backward; but for one or two tokens of an expert, whose product with the rows of a weight torch is good at."""
    say_products(monkeypatch, False)
    experts = use(
        cut_block(block_of("gpt_oss", torch.float32 if autocast else dtype), kept_of(WIDTHS["equal"])), implementation
    )
    inputs = routed(60, dtype=torch.float32 if autocast else dtype)
    with Products() as products, torch.set_grad_enabled(trained):
        with torch.autocast("cpu", dtype, enabled=autocast):
            output = experts(*inputs)
        if trained:
            output.square().sum().backward()
    assert output.dtype == inputs[0].dtype
    used = {kind for rows, *kinds in products.seen for kind in kinds if rows > 2}
    assert used == {torch.float32}
    assert len(products.seen) > 2, "those of the experts too, not those of the biases alone"


@torch.no_grad()
def test_autocast_lowers_the_experts_that_are_used_alone(monkeypatch):
    class Copies(TorchDispatchMode):
        sizes: ClassVar[set] = set()

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation.overloadpacket is torch.ops.aten._to_copy:
                self.sizes.add(args[0].numel())
            return operation(*args, **(kwargs or {}))

    say_products(monkeypatch, False)
    experts = use(cut_block(block_of("gpt_oss"), kept_of(WIDTHS["equal"])), "grouped_mm")
    with Copies() as copies, torch.autocast("cpu", torch.bfloat16):
        actual = experts(*routed(1))
    torch.testing.assert_close(actual, experts(*routed(1)), atol=0.03, rtol=0.03)
    assert max(copies.sizes) == experts.gate_up_proj.numel() // experts.num_experts


def second_gradient(experts, dtype) -> torch.Tensor:
    """To the inputs, of a gradient of the weights."""
    hidden, *routing = routed(60, dtype=dtype)
    output = experts(hidden.requires_grad_(), *routing)
    (first,) = torch.autograd.grad(output.square().sum(), experts.down_proj, create_graph=True)
    return torch.autograd.grad(first.square().sum(), hidden)[0]


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("name", ["equal", "different"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_have_gradients_where_products_are_converted(implementation, name, model_type, monkeypatch):
    say_products(monkeypatch, False)
    actual, expected = (
        second_gradient(use(cut_block(block_of(model_type, dtype), kept_of(WIDTHS[name])), implementation), dtype)
        for dtype in (torch.bfloat16, torch.float64)
    )
    assert (actual - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("forward", ["forward", "traced"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens_with_gradients(implementation, forward, products, monkeypatch):
    say_products(monkeypatch, products)
    experts = use(cut_block(block_of("gpt_oss", torch.bfloat16), kept_of(WIDTHS["equal"])), implementation)
    hidden, index, weights = (tensor[:0] for tensor in routed(4, dtype=torch.bfloat16))
    hidden.requires_grad_()
    output = (
        experts(hidden, index, weights) if forward == "forward" else traced_forward(experts, hidden, index, weights)
    )
    assert output.shape == hidden.shape
    (output.sum() + hidden.sum()).backward()
    assert experts.down_proj.grad is None or not experts.down_proj.grad.any()


def test_which_products_the_cpu_has_is_asked_of_onednn():
    assert not half_precision.lacks_products(torch.empty(1)) and not half_precision.lacks_products(
        torch.empty(1).double()
    )
    assert not half_precision.lacks_products(torch.empty(1, dtype=torch.bfloat16, device="meta"))
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    for dtype, name in asked.items():
        assert half_precision.lacks_products(torch.empty(1, dtype=dtype)) is not getattr(torch.ops.mkldnn, name)()
        assert half_precision.lacks_products(torch.empty(1), dtype) is not getattr(torch.ops.mkldnn, name)()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_few_tokens_take_all_experts_where_the_cpu_has_tiles(implementation, monkeypatch):
    say_products(monkeypatch, True)
    used = []
    for name in ("all_experts_forward", "few_shapes_forward"):
        function = getattr(half_precision, name)
        monkeypatch.setattr(
            half_precision, name, lambda *args, name=name, function=function: used.append(name) or function(*args)
        )
    half = use(cut_block(block_of("qwen3_moe", torch.bfloat16), kept_of(WIDTHS["different"])), implementation)
    for tiles in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        used.clear()
        outputs = [
            half(*routed(tokens, dtype=torch.bfloat16)) for tokens in (2, 3, 24, 25)
        ]  # six experts, two a token
        some = "all_experts_forward" if tiles else "few_shapes_forward"
        assert used == ["few_shapes_forward", some, some, "few_shapes_forward"]
        assert all(output.dtype == torch.bfloat16 for output in outputs)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(half_precision, "MANY_TOKENS", 20)
    used.clear()
    half(*routed(20, dtype=torch.bfloat16)), half(*routed(21, dtype=torch.bfloat16))
    assert used == ["all_experts_forward", "few_shapes_forward"]
    used.clear()
    half.half()(*routed(dtype=torch.float16))  # the tiles do not know float16
    assert used == ["few_shapes_forward"]
    half.float()(*routed())
    assert used == ["few_shapes_forward"]


def test_tokens_are_rounded_to_few_numbers():
    rounded = [half_precision.rounded_rows(count) for count in range(1, atomic_experts.ROWS_AT_ONCE + 1)]
    assert all(count <= rounded[count - 1] < 2 * count for count in range(1, len(rounded) + 1))
    assert len(set(rounded)) * half_precision.WIDTH_STEPS * 2 <= 1024  # the kernels that oneDNN keeps


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_on_a_cpu_has_few_shapes_of_products(implementation, monkeypatch):
    """32 experts of 32 widths, and tokens as they come: what the matrix library has compiled once serves again."""
    say_products(monkeypatch, True)
    shapes = set()
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: shapes.add((len(x), len(w))) or linear(x, w, b))
    stock = find_expert_blocks(tiny_model("qwen3_moe", num_experts=32, moe_intermediate_size=512))[0].module
    experts = use(AtomicExperts(stock, list(range(1, 512, 16))).bfloat16(), implementation)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    hidden, index, weights = routed(tokens=400, experts=32, dtype=torch.bfloat16)
    output = experts(hidden, index, weights)  # with gradients: shapes as they come
    shapes.clear()
    with torch.no_grad():
        rounded = experts(hidden, index, weights)
    assert {rows for rows, _ in shapes} <= {16, 32, 48} and {pairs for _, pairs in shapes} == set(range(64, 1025, 64))
    assert (rounded - output).norm() < 0.02 * output.norm()
