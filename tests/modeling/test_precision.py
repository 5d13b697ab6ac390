# Licensed under the Apache License, Version 2.0
"""Every precision on every way of computing a block, against a formula in float64 of its own: values and gradients.

The product of dtype, autocast, what is trained, widths and way is taken whole, as each has been right with most of the others.
"""

import contextlib
import functools
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from optimum_heapr.modeling import compiled, half_precision
from optimum_heapr.surgery.selection import cut_block
from tests.modeling.test_atomic_experts import block_of, kept_of, routed, use


FAMILIES = ("qwen3_moe", "gpt_oss")
WIDTHS = {
    "empty and odd": [5, 0, 3, 7, 1, 0],
    "two more than multiples of four": [6, 6, 10, 10, 2, 2],
    "equal": [8, 8, 8, 8, 8, 8],
    "of every kind": [12, 6, 6, 0, 8, 8],
    "empty": [0, 0, 0, 0, 0, 0],
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INPUTS = ("hidden", "weights")

# What needs a gradient; "adapter" adds a trained tensor to each frozen parameter, as PEFT does.
TRAINED = {"nothing": (), "everything": "all", "inputs": INPUTS, "experts": "parameters", "adapter": "adapter"}
WAYS = [*itertools.product(("loop", "grouped", "traced loop", "traced grouped"), TRAINED)]
WAYS += [
    *itertools.product(("in float32, loop", "in float32, grouped"), TRAINED),
    ("in float32, traced", "everything"),
]
WAYS += [("all experts at once", "nothing"), ("traced, all experts at once", "everything")]


def formula(block, parameters, widths, hidden, index, weights):
    """[tokens, d] token by token from the packed parameters, wherever those of an expert begin."""
    starts, total = {}, 0
    for expert in sorted(range(len(widths)), key=lambda e: -widths[e]):
        starts[expert], total = total, total + widths[expert]
    outputs = []
    for token, row in enumerate(hidden):
        output = torch.zeros_like(row)
        for expert, weight in zip(index[token].tolist(), weights[token]):
            start, width = starts[expert], widths[expert]
            pairs = slice(2 * start, 2 * (start + width))
            if width:
                gate_up = parameters["gate_up_proj"][pairs] @ row
                if "gate_up_proj_bias" in parameters:
                    gate_up = gate_up + parameters["gate_up_proj_bias"][pairs]
                activation = block.module._apply_gate(gate_up)
                output = output + weight * (activation @ parameters["down_proj"][start : start + width])
            if "down_proj_bias" in parameters:
                output = output + weight * parameters["down_proj_bias"][expert]
        outputs.append(output)
    return torch.stack(outputs)


@functools.cache
def exact(family: str, name: str) -> dict[str, torch.Tensor]:
    """Output, and the gradient of its sum of squares to everything."""
    block = stock(family, torch.float64)
    parameters = {n: p.detach().clone() for n, p in cut_block(block, kept_of(WIDTHS[name])).named_parameters()}
    hidden, index, weights = routed(12, dtype=torch.float64)
    wanted = {"hidden": hidden, "weights": weights, **parameters}
    output = formula(
        block, {n: p.requires_grad_() for n, p in parameters.items()}, WIDTHS[name], hidden.requires_grad_(), index,
        weights.requires_grad_(),
    )  # fmt: skip
    loss = output.square().sum() + 0 * hidden.sum()  # which depends on something even where there is nothing
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {"output": output.detach(), **dict(zip(wanted, gradients))}


@functools.cache
def stock(family: str, dtype: torch.dtype):
    return block_of(family, dtype)


class Sum(nn.Module):
    """Adds a tensor to a parameter. It is no parameter itself: an adapter computes it from its own."""

    def __init__(self, like: torch.Tensor):
        super().__init__()
        self.change = torch.zeros_like(like, requires_grad=True)

    def forward(self, parameter):
        return parameter + self.change


def trained_tensors(experts, inputs: dict, trained) -> dict[str, torch.Tensor]:
    """Opens what is to be trained, and closes the rest."""
    parameters = dict(experts.named_parameters())
    experts.requires_grad_(trained in ("all", "parameters"))
    for name in INPUTS:
        inputs[name].requires_grad_(trained == "all" or name in trained)
    if trained == "adapter":
        for name, parameter in parameters.items():
            parametrize.register_parametrization(experts, name, Sum(parameter))
            experts.parametrizations[name].original.requires_grad_(False)
        return {name: experts.parametrizations[name][0].change for name in parameters}
    return {name: tensor for name, tensor in {**inputs, **parameters}.items() if tensor.requires_grad}


def computed(way: str, experts, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "all experts" in way)
    has_products = {**dict.fromkeys(DTYPES, "in float32" not in way), torch.float32: True}
    monkeypatch.setattr(half_precision, "_has_products", has_products.__getitem__)
    use(experts, "grouped_mm" if "grouped" in way else "eager")
    # What a graph is traced from also runs by itself.
    return functools.partial(compiled.traced_forward, experts) if "traced" in way else experts


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way, trained", WAYS)
def test_values_and_gradients(way, dtype, autocast, trained, monkeypatch):
    # Sums of a few dozen rounded terms, whose errors largely cancel: a few units of the coarser dtype.
    tolerance = 6 * max(torch.finfo(used).eps for used in (dtype, autocast) if used)
    for family in FAMILIES:
        for name, widths in WIDTHS.items():
            experts = cut_block(stock(family, dtype), kept_of(widths))
            run = computed(way, experts, monkeypatch)
            # Under autocast, norms and residuals hand over float32.
            inputs = dict(zip(("hidden", "index", "weights"), routed(12, dtype=torch.float32 if autocast else dtype)))
            wanted = trained_tensors(experts, inputs, TRAINED[trained])
            precision = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
            with precision, torch.set_grad_enabled(bool(wanted)):
                output = run(*inputs.values())
            assert output.dtype == inputs["hidden"].dtype
            actual = {"output": output}
            if output.requires_grad:
                output.square().sum().backward()
                actual |= {name: tensor.grad for name, tensor in wanted.items()}
            else:
                assert not wanted or name == "empty"
            for part, tensor in actual.items():
                expected = exact(family, name)[part]
                tensor, expected = (0.0 if t is None else t.double() for t in (tensor, expected))
                error, size = torch.as_tensor(tensor - expected).norm(), torch.as_tensor(expected).norm()
                assert error <= tolerance * size, (family, name, part, float(error / size))
