# Licensed under the Apache License, Version 2.0
"""FP8 in, FP8 out: the names and types of the checkpoint that was pruned, its numbers where they did not change, and new scales else."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Experts

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.checkpoints.requantizing import check_requantizing
from optimum_heapr.checkpoints.saving import apply_streaming
from optimum_heapr.surgery import layer_by_layer
from optimum_heapr.utils.errors import HeaprError
from tests.checkpoints.test_dequantizing import files_of
from tests.helpers import calibration_data
from tests.quantized_checkpoints import BLOCK, dequantized, fp8_checkpoint, rewrite, spread, tensors_of
from tests.ranks import Ranks
from tests.surgery.stock_models import logits_of, random_plan, wide_model


WIDTH, KEPT = 3 * BLOCK, 2 * BLOCK
FAMILIES = {"qwen3_moe": {"skip": "layers.0.self_attn"}, "deepseek_v3": {"kv_lora_rank": 16}}


@pytest.fixture(scope="module", params=FAMILIES)
def pruned(request, tmp_path_factory):
    """The unpruned checkpoint, the pruned one in floating point, and the two ways to write it in FP8."""
    folder = tmp_path_factory.mktemp("requantized")
    source = fp8_checkpoint(folder / "source", request.param, width=WIDTH, **FAMILIES[request.param])
    plan = random_plan(load_model(source, dequantize=True)[0], layout="uniform", ratio=1 / 3, width_multiple=BLOCK)
    pruner = HeaprPruner.from_pretrained(source, dequantize=True)
    pruner.apply(plan)
    options = {"requantize": True, "max_shard_size": "40KB"}
    pruner.save_pretrained(folder / "memory", **options)
    apply_streaming(source, plan, folder / "plain", dequantize=True)
    apply_streaming(source, plan, folder / "stream", dequantize=True, **options)
    return folder


def test_it_looks_like_the_unpruned_one(pruned):
    assert files_of(pruned / "memory") == files_of(pruned / "stream")
    before, after = tensors_of(pruned / "source"), tensors_of(pruned / "stream")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if not name.endswith(("correction_bias", "mlp.gate.weight")):  # a model may hold these in float32
            assert tensor.dtype == before[name].dtype, name
    configs = [json.loads((pruned / name / "config.json").read_text()) for name in ("source", "stream")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[1]["moe_intermediate_size"] == KEPT

    index = json.loads((pruned / "stream" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys() and len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())


def test_only_experts_have_other_numbers(pruned):
    before, plain, after = (tensors_of(pruned / name) for name in ("source", "plain", "stream"))
    changed = [name for name in plain if before[name].dtype == torch.float8_e4m3fn and ".experts." in name]
    assert changed and all(plain[name].shape != before[name].shape for name in changed)
    for name in before.keys() - {*changed, *(f"{name}_scale_inv" for name in changed)}:
        assert torch.equal(after[name].float(), before[name].float()), name
    for name in changed:
        blocks = plain[name].float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        scale = after[f"{name}_scale_inv"]
        torch.testing.assert_close(scale, blocks.abs().amax((1, 3)) / 448, rtol=1e-6, atol=0)
        # Three bits of mantissa, and below the least exponent equal steps.
        error = (dequantized(after, name) - plain[name].float()).abs()
        step = spread(scale, plain[name].shape) * 2.0**-10
        assert (error <= torch.maximum(plain[name].float().abs() / 16, step) * 1.001).all(), name


def test_it_loads_as_stock_transformers_loads_it(pruned):
    """On a CPU in floating point: FP8 kernels need a GPU."""
    ours, _ = load_model(pruned / "stream", dequantize=True)
    if ours.config.model_type == "qwen3_moe":  # of which all blocks are whole
        stock = AutoModelForCausalLM.from_pretrained(pruned / "stream")
        assert torch.equal(logits_of(stock), logits_of(ours))
    name = "model.layers.2.mlp.experts.down_proj"
    expected = dequantized(tensors_of(pruned / "stream"), "model.layers.2.mlp.experts.3.down_proj.weight").bfloat16()
    assert torch.equal(ours.get_parameter(name)[3], expected)


def test_powers_of_two_stay_powers_of_two(tmp_path):
    """`scale_fmt: ue8m0`, as in DeepSeek-V3.1, whose scales are float32 all the same."""
    source = fp8_checkpoint(tmp_path / "source", width=WIDTH)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (source / "config.json").write_text(json.dumps(config))
    plan = random_plan(load_model(source, dequantize=True)[0], layout="uniform", ratio=1 / 3, width_multiple=BLOCK)
    apply_streaming(source, plan, tmp_path / "pruned", dequantize=True, requantize=True)
    stored = tensors_of(tmp_path / "pruned")
    scales = stored["model.layers.0.mlp.experts.0.down_proj.weight_scale_inv"]
    assert scales.dtype == torch.float32 and torch.equal(scales.log2(), scales.log2().round())


def test_width_that_is_no_whole_block_is_refused_before_anything_is_written(pruned, tmp_path):
    plan = random_plan(load_model(pruned / "source", dequantize=True)[0], layout="uniform", ratio=0.5)
    with pytest.raises(
        HeaprError, match="the width 24 is no multiple of the 16 weights that share a scale; plan with wid"
    ):
        apply_streaming(pruned / "source", plan, tmp_path / "out", dequantize=True, requantize=True)
    assert not list(tmp_path.iterdir())


def test_packed_tensors_are_refused(pruned):
    pruner = HeaprPruner.from_pretrained(pruned / "source", dequantize=True)
    pruner.apply(random_plan(pruner.model, layout="uniform", ratio=1 / 3, width_multiple=BLOCK))
    with pytest.raises(HeaprError, match="requantize=True: needs the tensors of one expert each"):
        pruner.save_pretrained(pruned / "packed", requantize=True, save_original_format=False)


def test_transformers_has_no_fp8_experts_with_biases():
    """Which is why what was in MXFP4 cannot be written in FP8: the guide says so."""
    with pytest.raises(AssertionError, match="FP8Experts does not support bias for now"):
        FP8Experts(wide_model("gpt_oss").config, has_bias=True)


@pytest.mark.parametrize(
    "quantization", [None, {"quant_method": "mxfp4"}, {"quant_method": "fp8", "weight_block_size": None}]
)
def test_what_is_not_in_fp8_blocks_is_refused(quantization, tmp_path):
    wide_model("qwen3_moe").save_pretrained(tmp_path)
    if quantization:
        rewrite(tmp_path, lambda name, tensor: {name: tensor}, quantization)
    kind = quantization["quant_method"] if quantization else "unquantized"
    with pytest.raises(HeaprError, match=rf"a scale for each block, and .* is not \({kind}\); leave it out"):
        check_requantizing(HeaprConfig(layout="uniform"), tmp_path)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """What is fitted and trained over blocks, from the checkpoint as it is: a function that makes the pruner, and what one run writes."""
    folder = tmp_path_factory.mktemp("fitted")
    source, data = fp8_checkpoint(folder / "source", width=WIDTH), calibration_data(*[24] * 40)
    data.samples = [sample % 96 for sample in data.samples]  # that many tokens it knows
    options = {"layout": "uniform", "ratio": 1 / 3, "width_multiple": BLOCK, "reconstruction_steps": 4}
    config = HeaprConfig(**options, compensate=True, compensation_scope="block", batch_size=8)
    statistics = calibrate(load_model(source, dequantize=True)[0], data, 8)

    def made() -> HeaprPruner:
        pruner = HeaprPruner.from_pretrained(source, config, memory="streaming", dequantize=True)
        pruner.statistics, pruner.calibration_data = statistics, data
        return pruner

    pruner = made()
    pruner.apply(pruner.plan())
    pruner.save_pretrained(folder / "whole", requantize=True)
    return made, tensors_of(folder / "whole")


def assert_same_bytes(folder, expected):
    found = tensors_of(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.uint8), one.view(torch.uint8)) for name, one in expected.items())


def test_a_run_that_was_killed_while_it_trained_goes_on(fitted, monkeypatch, tmp_path):
    made, expected = fitted
    plain, blocks = layer_by_layer._fitted, []

    def killed(model, block, *arguments):
        if len(blocks) == 1:
            raise KeyboardInterrupt
        blocks.append(block.path)
        return plain(model, block, *arguments)

    pruner = made()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layer_by_layer, "_fitted", killed)
        pruner.apply(pruner.plan(), fits_path=tmp_path / "fits")
    assert len(list((tmp_path / "fits").iterdir())) == 1
    pruner = made()
    pruner.apply(pruner.plan(), fits_path=tmp_path / "fits")
    pruner.save_pretrained(tmp_path / "pruned", requantize=True)
    assert_same_bytes(tmp_path / "pruned", expected)


def test_two_processes_write_what_one_does(fitted, monkeypatch, tmp_path):
    made, expected = fitted
    ranks = Ranks(monkeypatch)

    def run(rank):
        pruner = made()
        pruner.apply(pruner.plan())
        if rank == 0:
            pruner.save_pretrained(tmp_path / "pruned", requantize=True)

    ranks.run(run)
    found = tensors_of(tmp_path / "pruned")
    assert found.keys() == expected.keys()
    for name in expected:  # sums of two processes may round another way, and that by a step of FP8
        one, other = dequantized(found, name), dequantized(expected, name)
        assert (one - other).norm() <= 0.01 * other.norm(), name
