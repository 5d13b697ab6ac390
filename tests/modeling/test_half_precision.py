# Licensed under the Apache License, Version 2.0
"""What half precision on a CPU runs instead of the loop; mostly in float64, where it can be told from it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.modeling import atomic_experts, half_precision
from optimum_heapr.modeling.atomic_experts import AtomicExperts
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_few_tokens_take_all_experts_where_the_cpu_has_tiles(implementation, monkeypatch):
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
