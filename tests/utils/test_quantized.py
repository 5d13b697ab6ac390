# Licensed under the Apache License, Version 2.0
"""Quantized checkpoints are refused with what to do, or turned into floating point when asked."""

import pytest
import torch

from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.pruner import HeaprPruner
from optimum_heapr.utils.errors import HeaprError
from tests.quantized_checkpoints import dequantized, fp8_checkpoint, mxfp4_checkpoint, rewrite, tensors_of, unpacked
from tests.surgery.stock_models import logits_of, random_plan, wide_model


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return fp8_checkpoint(tmp_path_factory.mktemp("fp8"))


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    return mxfp4_checkpoint(tmp_path_factory.mktemp("mxfp4"))


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


@pytest.mark.parametrize("skeleton", [False, True])
def test_a_method_that_transformers_does_not_know_is_refused_where_others_load(skeleton, tmp_path):
    """transformers warns, and takes what is stored for weights."""
    wide_model("qwen3_moe").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda name, tensor: {name: tensor}, {"quant_method": "int5-by-nobody"})
    with pytest.raises(HeaprError, match=r"\(int5-by-nobody\), which this transformers does not know; install"):
        load_model(tmp_path, allow_quantized=True, skeleton=skeleton)


def test_what_is_not_quantized_is_said_not_to_be(fp8, tmp_path, heapr_log):
    """Who asked for it may have named another checkpoint than was meant; of several to evaluate some may be quantized."""
    wide_model("qwen3_moe").save_pretrained(tmp_path)
    load_model(fp8, dequantize=True)
    load_model(tmp_path, dequantize=True, allow_quantized=True)
    load_model(tmp_path)
    assert not heapr_log.text
    load_model(tmp_path, dequantize=True)
    assert (
        f"model={str(tmp_path)!r}: dequantize=True changes nothing, as its weights are not quantized" in heapr_log.text
    )


@pytest.mark.parametrize("reason", [RuntimeError("GPU is required"), NameError("name 'Reader' is not defined")])
def test_what_reads_quantized_weights_and_cannot_is_one_line(reason, tmp_path, monkeypatch):
    def cannot(*arguments, **options):
        raise reason

    monkeypatch.setattr("transformers.quantizers.quantizer_spqr.SpQRHfQuantizer.validate_environment", cannot)
    wide_model("qwen3_moe").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda name, tensor: {name: tensor}, {"quant_method": "spqr"})
    with pytest.raises(HeaprError, match=rf"are quantized \(spqr\), and cannot be loaded here \({reason}\); install"):
        load_model(tmp_path, allow_quantized=True)


def test_fp8_is_dequantized_exactly(fp8):
    block = find_expert_blocks(HeaprPruner.from_pretrained(fp8, dequantize=True, dtype="float32").model)[1]
    expected = dequantized(tensors_of(fp8), f"{block.path}.3.down_proj.weight")
    assert torch.equal(block.down_rows(3).T, expected)


def test_mxfp4_is_dequantized_exactly(mxfp4):
    block = find_expert_blocks(HeaprPruner.from_pretrained(mxfp4, dequantize=True).model)[1]
    assert torch.equal(block.down_rows(3).T.float(), unpacked(tensors_of(mxfp4), f"{block.path}.down_proj")[3])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_weights_have_the_dtype_that_was_asked_for(dtype, fp8):
    """transformers leaves those that are not quantized in the checkpoint's, and then multiplies one with the other."""
    model, _ = load_model(fp8, dequantize=True, dtype=dtype)
    assert {str(weight.dtype) for weight in model.parameters()} == {f"torch.{dtype}"}
    assert torch.isfinite(logits_of(model)).all()


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
