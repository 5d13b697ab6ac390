# Licensed under the Apache License, Version 2.0
"""Quantized checkpoints file by file: the same weights, statistics and output as in memory, bit for bit."""

import json
from functools import partial

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.checkpoints.loading import choose_memory, load_model, source_of
from optimum_heapr.checkpoints.saving import apply_streaming
from optimum_heapr.estimate import estimate
from optimum_heapr.utils.errors import HeaprError
from tests.helpers import random_ids
from tests.quantized_checkpoints import (
    dequantized,
    fp8_checkpoint,
    fp8_settings,
    mxfp4_checkpoint,
    rewrite,
    tensors_of,
    unpacked,
)
from tests.surgery.stock_models import layout_plan, logits_of, wide_model


# Names of experts as in checkpoints; attention with rows that are no whole blocks; and what stays as it was.
KINDS = {
    "qwen3_moe": fp8_checkpoint,
    "deepseek_v3": partial(fp8_checkpoint, model_type="deepseek_v3", kv_lora_rank=16),
    "self_attn kept": partial(fp8_checkpoint, skip="self_attn"),
    "mxfp4": mxfp4_checkpoint,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {kind: make(tmp_path_factory.mktemp("quantized") / kind.split()[0]) for kind, make in KINDS.items()}


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_read_as_loading_gives_them(kind, checkpoints):
    model, _ = load_model(checkpoints[kind], dequantize=True)
    source = source_of(load_model(checkpoints[kind], skeleton=True, dequantize=True)[0])
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == source.dtypes
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.load(name, torch.device("cpu")), tensor), name


def test_blocks_that_are_cut_off_have_their_own_scales(checkpoints):
    folder = checkpoints["deepseek_v3"]
    stored = tensors_of(folder)
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    rows, scales = stored[name].shape[0], stored[f"{name}_scale_inv"].shape[0]
    assert rows % 16 and rows % scales == 0, "such that other blocks would do as well"
    source = source_of(load_model(folder, skeleton=True, dequantize=True)[0])
    assert torch.equal(source.parameter(name), dequantized(stored, name).bfloat16())


def test_experts_are_what_the_bits_stand_for(checkpoints):
    source = source_of(load_model(checkpoints["qwen3_moe"], skeleton=True, dequantize=True)[0])
    stored, path = tensors_of(checkpoints["qwen3_moe"]), source.blocks[1].path
    parts = [dequantized(stored, f"{path}.3.{name}_proj.weight").bfloat16() for name in ("gate", "up")]
    assert torch.equal(source.parameter(f"{path}.gate_up_proj", 3)[0], torch.cat(parts))

    source = source_of(load_model(checkpoints["mxfp4"], skeleton=True, dequantize=True)[0])
    stored, path = tensors_of(checkpoints["mxfp4"]), source.blocks[1].path
    expected = unpacked(stored, f"{path}.gate_up_proj")[3].T.bfloat16()
    assert torch.equal(source.parameter(f"{path}.gate_up_proj", 3)[0], expected)


@pytest.mark.parametrize("layout", ["variable", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_as_in_memory(kind, layout, checkpoints, tmp_path):
    pruner = HeaprPruner.from_pretrained(checkpoints[kind], dequantize=True)
    plan = layout_plan(pruner.model, layout)
    pruner.apply(plan)
    pruner.save_pretrained(tmp_path / "memory", max_shard_size="60KB")
    apply_streaming(checkpoints[kind], plan, tmp_path / "stream", dequantize=True, max_shard_size="60KB")
    assert files_of(tmp_path / "stream") == files_of(tmp_path / "memory")
    assert "quantization" not in (tmp_path / "stream" / "config.json").read_text()
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "stream").values()} <= {torch.bfloat16, torch.float32}
    assert torch.equal(logits_of(load_model(tmp_path / "stream")[0]), logits_of(pruner.model))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mxfp4"])
def test_same_statistics_and_output_as_in_memory(kind, checkpoints, tmp_path):
    """With compensation, for which one layer at a time is loaded too."""
    options = {"criterion": "obs", "compensate": True, "compensation_scope": "block"}
    config = HeaprConfig(num_samples=4, seq_length=16, ratio=0.25, **options)
    rows = Dataset.from_dict({"input_ids": random_ids(4, 16, vocab_size=96).tolist()})
    for memory in ("plain", "streaming"):
        pruner = HeaprPruner.from_pretrained(checkpoints[kind], config, memory=memory, dequantize=True)
        pruner.calibrate(rows)
        pruner.apply(pruner.plan())
        pruner.save_pretrained(tmp_path / memory)
    plain, streamed = (tensors_of(tmp_path / memory) for memory in ("plain", "streaming"))
    assert plain.keys() == streamed.keys()
    assert [name for name in plain if not torch.equal(plain[name], streamed[name])] == []
    saved = [tensors_of(tmp_path / memory / "heapr") for memory in ("plain", "streaming")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_memory_is_that_of_floating_point_and_reading_that_of_the_checkpoint(checkpoints):
    folder = checkpoints["qwen3_moe"]
    model, _ = load_model(folder, dequantize=True)
    weights = sum(parameter.numel() * 2 for parameter in model.parameters())
    memory, found = choose_memory(folder, HeaprConfig(num_samples=4, seq_length=16), dequantize=True)
    assert memory == "plain" and found.weights == weights
    found = estimate(folder)
    assert found.size.weight_bytes == weights
    read = {way.mode: way.bytes_read for way in found.calibration}
    assert read["plain"] == found.stored_bytes < 0.75 * weights
    assert read["streaming"] == 2 * found.stored_bytes, "no layer lies below the first experts"


def test_a_text_model_inside_may_say_how_it_is_quantized(tmp_path):
    """As in checkpoints of several modalities; the words are gone from both places of what is written."""
    folder = fp8_checkpoint(tmp_path / "source", "qwen3_vl_moe", skip="visual")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    plan = layout_plan(load_model(folder, dequantize=True)[0], "variable")
    apply_streaming(folder, plan, tmp_path / "pruned", dequantize=True)
    assert "quantization" not in (tmp_path / "pruned" / "config.json").read_text()


def packed(folder):
    """Experts of a layer in one FP8 tensor, with scales, which transformers does not read."""
    wide_model("gpt_oss").save_pretrained(folder)

    def quantize(name, tensor):
        if not name.endswith("down_proj"):
            return {name: tensor}
        return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(len(tensor), 2, 2)}

    rewrite(folder, quantize, fp8_settings())
    return folder


@pytest.mark.parametrize("skeleton", [False, True])
def test_weights_without_scales_that_are_read_are_refused(skeleton, tmp_path):
    with pytest.raises(HeaprError, match="3 of its weights are quantized and have no scales that transformers finds"):
        load_model(packed(tmp_path), skeleton=skeleton, dequantize=True)


def test_an_embedding_that_is_stored_twice_in_fp8_is_tied_if_equal(tmp_path):
    model = wide_model("qwen3_moe", tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    twice = {name: embedding.to(torch.float8_e4m3fn) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for scale in (1.0, 2.0):
        scales = {f"{name}_scale_inv": torch.full((6, 2), 1.0) for name in twice}
        scales["lm_head.weight_scale_inv"] *= scale
        save_file({**weights, **twice, **scales}, tmp_path / "model.safetensors", {"format": "pt"})
        rewrite(tmp_path, lambda name, tensor: {name: tensor}, fp8_settings())
        whole, _ = load_model(tmp_path, dequantize=True)
        skeleton, _ = load_model(tmp_path, dequantize=True, skeleton=True)
        for loaded in (whole, skeleton):
            tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
            assert tied == (scale == 1.0)
