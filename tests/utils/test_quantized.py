# Licensed under the Apache License, Version 2.0
"""Quantized checkpoints are refused with what to do, or turned into floating point when asked."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.checkpoints.saving import apply_streaming
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.pruner import HeaprPruner
from optimum_heapr.utils.errors import HeaprError
from tests.surgery.stock_models import logits_of, random_plan, wide_model


BLOCK = 16
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def rewrite(folder, change, quantization):
    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        tensors.update(change(name, tensor))
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """A checkpoint with FP8 weights and one scale for 16 x 16 of them."""

    def quantize(name, tensor):
        if "_proj" not in name:
            return {name: tensor}
        rows, columns = tensor.shape
        blocks = tensor.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        weight = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
        return {name: weight, f"{name}_scale_inv": scale}

    folder = tmp_path_factory.mktemp("fp8")
    wide_model("qwen3_moe").save_pretrained(folder)
    block_size = {"weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic", "fmt": "e4m3"}
    rewrite(folder, quantize, {"quant_method": "fp8", **block_size})
    return folder


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    """A checkpoint with the experts of gpt_oss in 4 bits and one exponent for 32 of them."""
    generator = torch.Generator().manual_seed(0)

    def quantize(name, tensor):
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor}
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(122, 126, shape, dtype=torch.uint8, generator=generator)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    folder = tmp_path_factory.mktemp("mxfp4")
    wide_model("gpt_oss").to(torch.bfloat16).save_pretrained(folder)
    rewrite(folder, quantize, {"quant_method": "mxfp4"})
    return folder


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_refused_with_what_to_do(kind, request):
    folder = request.getfixturevalue(kind)
    with pytest.raises(HeaprError, match=rf"quantized \({kind}\), which cannot be cut; pass dequantize=True"):
        HeaprPruner.from_pretrained(folder)


def test_method_that_cannot_be_undone_is_refused_either_way(tmp_path):
    wide_model("qwen3_moe").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda name, tensor: {name: tensor}, {"quant_method": "gptq", "bits": 4})
    for dequantize in (False, True):
        with pytest.raises(
            HeaprError, match=r"quantized \(gptq\), which cannot be cut; name the checkpoint in bfloat16"
        ):
            HeaprPruner.from_pretrained(tmp_path, dequantize=dequantize)


def test_streaming_is_refused(fp8, tmp_path):
    plan = random_plan(wide_model("qwen3_moe"), layout="uniform")
    with pytest.raises(HeaprError, match="pass dequantize=True"):
        apply_streaming(fp8, plan, tmp_path / "pruned")
    with pytest.raises(HeaprError, match="cannot be dequantized file by file; use HeaprPruner.apply"):
        apply_streaming(fp8, plan, tmp_path / "pruned", dequantize=True)


def test_fp8_is_dequantized_exactly(fp8):
    stored = load_file(fp8 / "model.safetensors")
    block = find_expert_blocks(HeaprPruner.from_pretrained(fp8, dequantize=True).model)[1]
    name = f"{block.path}.3.down_proj.weight"
    scale = stored[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    assert torch.equal(block.down_rows(3).T, stored[name].float() * scale)


def test_mxfp4_is_dequantized_exactly(mxfp4):
    stored = load_file(mxfp4 / "model.safetensors")
    block = find_expert_blocks(HeaprPruner.from_pretrained(mxfp4, dequantize=True).model)[1]
    packed, scales = stored[f"{block.path}.down_proj_blocks"][3], stored[f"{block.path}.down_proj_scales"][3]
    values = torch.tensor(FP4)[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]
    expected = (values * 2.0 ** (scales.float() - 127).unsqueeze(-1)).flatten(-2)
    assert torch.equal(block.down_rows(3).T.float(), expected)


@pytest.mark.parametrize("layout", ["variable", "uniform"])
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_pruned_model_is_an_ordinary_one(kind, layout, request, tmp_path):
    pruner = HeaprPruner.from_pretrained(request.getfixturevalue(kind), dequantize=True)
    pruner.apply(random_plan(pruner.model, layout=layout, ratio=0.25))
    pruner.save_pretrained(tmp_path / "pruned")
    assert "quant" not in (tmp_path / "pruned" / "config.json").read_text()
    reloaded, _ = load_model(tmp_path / "pruned")
    assert torch.equal(logits_of(reloaded), logits_of(pruner.model))


def test_weights_are_not_quantized_on_the_way_in(tmp_path):
    """`from_pretrained` would: attention in 8 bits, and experts that are cut in floating point."""
    from transformers import QuantoConfig

    with pytest.raises(HeaprError, match="quantization_config: quantized weights cannot be cut; leave it out, prune"):
        HeaprPruner.from_pretrained("demo", quantization_config=QuantoConfig(weights="int8"))
