# Licensed under the Apache License, Version 2.0
"""The guide to one GPU: its commands, and its bytes against the tensors of the real model and the formulas of large models."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_heapr import HeaprConfig
from optimum_heapr.estimate import estimate
from tests.calibration.test_work import MODELS
from tests.docs.pages import ROOT
from tests.docs.running import pages_run


test_snippets_run = pages_run("docs/source/guides/one_gpu.md")

PAGE = (ROOT / "docs/source/guides/one_gpu.md").read_text(encoding="utf-8")
RECIPE = ROOT / "recipes/qwen3-30b-a3b/prune_33.yaml"
MODEL = MODELS["Qwen3-30B-A3B"]
WIDTHS = (768, 512, 384)

# Bytes of a matrix of so many rows and columns, with its scales.
FORMATS = {
    "bfloat16": lambda rows, columns: 2 * rows * columns,
    "FP8_DYNAMIC": lambda rows, columns: rows * columns + 2 * rows,
    "NF4": lambda rows, columns: rows * columns // 2 + 4 * rows * columns // 64,
    "W4A16": lambda rows, columns: rows * columns // 2 + 2 * rows * columns // 128,
}


@pytest.fixture(scope="module")
def sizes() -> dict[int, dict[str, int]]:
    """By width of the experts, the bytes of all tensors in each format: linear layers but the head, and experts as if they were such."""
    found = {}
    for width in WIDTHS:
        config = type(MODEL)(**{**MODEL.to_dict(), "moe_intermediate_size": width})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        layers = (
            module for module in model.modules() if isinstance(module, nn.Linear) and module is not model.lm_head
        )
        matrices = [tuple(layer.weight.shape) for layer in layers]
        for experts in (module for module in model.modules() if hasattr(module, "gate_up_proj")):
            matrices += [(width, MODEL.hidden_size)] * 2 * len(experts.gate_up_proj)
            matrices += [(MODEL.hidden_size, width)] * len(experts.down_proj)
        rest = model.num_parameters() - sum(rows * columns for rows, columns in matrices)
        found[width] = {name: 2 * rest + sum(size(*shape) for shape in matrices) for name, size in FORMATS.items()}
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_of_each_format(name, sizes):
    cells = " | ".join(f"{sizes[width][name] / 1e9:.1f}" for width in WIDTHS)
    assert f"| {name} | {cells} |" in PAGE


def test_bytes_of_q4_k_m():
    """Bits of llama.cpp's types; which of them are where is what `tests/serving/test_llama_quantize.py` sees, and what llama.cpp says."""
    q4_k, q6_k, q5_0, q8_0 = 144 / 32, 210 / 32, 22 / 4, 34 / 4
    hidden, layers, experts = MODEL.hidden_size, MODEL.num_hidden_layers, MODEL.num_experts
    queries, keys = (heads * MODEL.head_dim for heads in (MODEL.num_attention_heads, MODEL.num_key_value_heads))
    cells = []
    for width in WIDTHS:
        down = (q4_k + q6_k) / 2 if width % 256 == 0 else (q5_0 + q8_0) / 2
        layer = hidden * (experts * width * (2 * q4_k + down) + (2 * queries + keys) * q4_k + keys * (q4_k + q6_k) / 2)
        layer += 32 * (hidden * experts + 2 * hidden + 2 * MODEL.head_dim)  # router and norms
        bits = layers * layer + hidden * (MODEL.vocab_size * (q4_k + q6_k) + 32)
        cells.append(f"{bits / 8 / 1e9:.1f}")
    assert f"| Q4_K_M | {' | '.join(cells)} |" in PAGE


def test_sizes_in_bfloat16_are_what_estimate_says(sizes, tmp_path):
    MODEL.save_pretrained(tmp_path)
    found = estimate(tmp_path, HeaprConfig.from_file(RECIPE), ratios=(0.3333, 0.5))
    assert found.size.weight_bytes == sizes[768]["bfloat16"]
    assert {at.width: at.weight_bytes for at in found.pruned if at.layout == "uniform"} == {
        width: sizes[width]["bfloat16"] for width in (512, 384)
    }
    assert f"{found.routed_parameters / found.size.parameters:.0%}".replace("%", " %") in PAGE
    streaming = next(way for way in found.calibration if way.mode == "streaming")
    words = " ".join(PAGE.split())
    assert (
        f"{streaming.weights / 1e9:.2f} GB of weights, {streaming.statistics / 1e9:.2f} GB of statistics and "
        f"{streaming.activations / 1e9:.2f} GB of activations at once, {streaming.layer_inputs / 1e9:.1f} GB of layer inputs on the host, "
        f"or past its budget on the disk, {streaming.bytes_read / 1e9:.0f} GB read, and {streaming.flops / 1e15:.2f} PFLOP"
    ) in words


def test_what_fitting_and_training_take():
    """The formulas of the page on large models."""
    config = HeaprConfig.from_file(RECIPE)
    T, d, K, E, I, L = config.num_samples * config.seq_length, MODEL.hidden_size, 8, 128, 768, 48  # noqa: E741
    fitted = K * T * (2 * I + 28) + 6 * E * I * d + 2**27 * (1 + I / d) + 12 * T * d
    fitted += max(2 * T * (d + I), 4 * E * I**2 + 24 * min(E * I * d, 2**25))
    trained = T * 16 * d + 84 * E * I * d
    trained += 16_384 * K * (2 * d + 5 * I)
    flops = config.reconstruction_steps * 36_864 * K * 512 * d * L
    assert max(fitted, trained) < 24e9
    words = " ".join(PAGE.split())
    assert (
        f"at most {fitted / 1e9:.1f} GB while a block is fitted and {trained / 1e9:.1f} GB while it is trained"
        in words
    )
    assert f"{flops / 1e15:.1f} PFLOP in float32" in words


def test_keys_and_values(sizes):
    each = 2 * MODEL.num_key_value_heads * MODEL.head_dim * 2 * MODEL.num_hidden_layers
    assert f"take {each:,} bytes" in " ".join(PAGE.split()) and f"{each * 32_768 / 1e9:.1f} GB" in PAGE
    assert sizes[768]["W4A16"] < 0.9 * 24e9 < sizes[768]["FP8_DYNAMIC"] and sizes[512]["FP8_DYNAMIC"] < 0.9 * 24e9
    assert f"leaves {(sizes[768]['W4A16'] - sizes[512]['W4A16']) / 1e9:.0f} GB more" in " ".join(PAGE.split())


def test_the_recipe_is_that_of_its_folder():
    assert RECIPE.read_text(encoding="utf-8").partition("ratio:")[2] in PAGE
