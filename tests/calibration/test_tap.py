# Licensed under the Apache License, Version 2.0
"""The tap in the experts' forward: what it costs, and that recomputation and odd shapes change nothing."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_heapr.calibration.loss import summed_token_loss
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.calibration.tap import calibration_experts_forward, calibration_tap, new_accumulators, tapped
from optimum_heapr.criteria import importance
from optimum_heapr.experts import find_expert_blocks
from tests.helpers import SUMS, assert_same_statistics, calibration_data, random_ids, tiny_model


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_recomputation_counts_nothing_twice(model_type, reentrant):
    model, data = tiny_model(model_type, dtype=torch.float64), calibration_data(16, 16)
    expected = calibrate(model, data, batch_size=2)
    model.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for layer in model.model.layers:
        layer.training = True  # only the layer: its children, dropout included, stay in evaluation mode
    blocks, calls = find_expert_blocks(model), []
    for block in blocks:
        block.module.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = next(data.micro_batches(2))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with calibration_tap(model, blocks) as accumulators:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        summed_token_loss(logits, ids, mask)[0].backward()
    assert len(calls) == 2 * len(blocks), "checkpointing was not active, so this test would show nothing"
    for block in blocks:
        sums, block_expected = accumulators[block.path], expected.blocks[block.path]
        assert torch.equal(sums.token_count, block_expected.token_count)
        for name in SUMS:
            torch.testing.assert_close(getattr(sums, name), getattr(block_expected, name), rtol=1e-9, atol=0)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_rows_of_router_weight_zero_are_not_counted(padded):
    """A router that lets tokens skip names expert 0 for them, with the weight 0."""
    model = tiny_model(dtype=torch.float64)
    block = find_expert_blocks(model)[0]
    generator = torch.Generator().manual_seed(0)
    hidden, cotangent = torch.randn(2, 24, model.config.hidden_size, generator=generator, dtype=torch.float64)
    expert = torch.randint(0, block.num_experts, (24, 1), generator=generator)
    weight = 0.1 + torch.rand(24, 1, generator=generator, dtype=torch.float64)
    skips = torch.arange(24) % 3 == 0
    expert[skips], weight[skips] = 0, 0
    expert[-1] = 0  # and one that does not skip
    mask = torch.arange(24) < 20 if padded else torch.ones(24, dtype=torch.bool)
    cotangent = cotangent * mask[:, None]

    def sums(rows):
        accumulators = new_accumulators([block], gram=True)
        accumulators[block.path].token_mask = mask[rows] if padded else None
        with tapped([block], accumulators):
            output = calibration_experts_forward(block.module, hidden[rows], expert[rows], weight[rows])
            (output * cotangent[rows]).sum().backward()
        accumulators[block.path].complete()
        return output.detach(), accumulators[block.path].sums()

    (whole, found), (routed, expected) = sums(slice(None)), sums(~skips)
    assert torch.equal(whole[skips], torch.zeros_like(whole[skips]))
    torch.testing.assert_close(whole[~skips], routed, rtol=1e-12, atol=1e-15)
    assert int(found["token_count"].sum()) == int((mask & ~skips).sum())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-15)


def test_a_model_with_checkpointing_switched_on_gives_the_same_statistics():
    model, data = tiny_model("qwen2_moe", dtype=torch.float64), calibration_data(9, 16)
    expected = calibrate(model, data)
    model.gradient_checkpointing_enable()
    model.train()
    assert_same_statistics(calibrate(model, data), expected, rtol=0)
    assert model.is_gradient_checkpointing


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that any operation makes, in forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.seen.add(tuple(value.shape))
        return result


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_no_matrix_of_hidden_size_by_hidden_size_is_ever_formed(model_type):
    d = 52  # no other size of these models and samples
    model = tiny_model(model_type, hidden_size=d)
    assert all(list(parameter.shape).count(d) < 2 for parameter in model.parameters())
    with Shapes() as shapes:
        importance(calibrate(model, calibration_data(16, 7), batch_size=2), "heapr")
    assert any(d in shape for shape in shapes.seen)
    assert [shape for shape in shapes.seen if shape.count(d) > 1] == []
    # Nor hidden under another shape: the largest tensors are the logits and the weights.
    largest = max(2 * 16 * model.config.vocab_size, max(parameter.numel() for parameter in model.parameters()))
    assert max(math.prod(shape) for shape in shapes.seen) <= largest


def test_no_gradient_of_a_weight_is_ever_formed():
    """The activation-only backward: the shapes of the router and the embedding weights appear in no gradient."""
    model = tiny_model("qwen3_moe")
    touched = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: touched.append(name))
    calibrate(model, calibration_data(8))
    assert touched == []


# Shapes and dtypes


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("width", [12, 10, 7], ids=lambda width: f"width_{width}")
def test_widths_that_the_grouped_kernel_refuses_are_measured_too(model_type, width):
    """In float32 rows of 10 or 7 numbers are no whole 16 bytes; a model that runs such widths must calibrate as well."""
    changes = {"intermediate_size" if model_type == "gpt_oss" else "moe_intermediate_size": width}
    data = calibration_data(16, 9)
    exact = calibrate(tiny_model(model_type, dtype=torch.float64, **changes), data, batch_size=2)
    single = calibrate(tiny_model(model_type, experts_implementation="eager", **changes), data, batch_size=2)
    for path, block in exact.blocks.items():
        for name in SUMS:
            actual, expected = getattr(single.blocks[path], name), getattr(block, name)
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4 * expected.max().item())


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss", "mixtral", "deepseek_v2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["grouped", "looped"])
def test_the_calibration_forward_computes_what_the_model_does(model_type, dtype):
    model, ids = tiny_model(model_type, dtype=dtype), random_ids(2, 11)
    blocks = find_expert_blocks(model)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with calibration_tap(model, blocks) as accumulators:
            actual = model(input_ids=ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    # Nothing was differentiated, so nothing was measured: both sums are made in the backward.
    assert all(int(sums.token_count.sum()) == 0 for sums in accumulators.values())
    assert all(float(sums.activation_sq_sum.sum()) == 0 for sums in accumulators.values())


def test_autocast_does_not_reach_the_sums():
    """Inside bfloat16 autocast activations are rounded, but their squares are still summed in float32."""
    model, data = tiny_model("qwen3_moe"), calibration_data(16)
    with torch.autocast("cpu", torch.bfloat16):
        statistics = calibrate(model, data)
    for block in statistics.blocks.values():
        for name in SUMS:
            sums = getattr(block, name)
            assert sums.dtype == torch.float32
            assert not torch.equal(sums, sums.bfloat16().float())
