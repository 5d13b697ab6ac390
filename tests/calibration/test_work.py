# Licensed under the Apache License, Version 2.0
"""The formulas of what a calibration takes against counted operations and bytes, and the documentation against them."""

import dataclasses

import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from optimum_heapr import HeaprConfig
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.calibration.streaming import calibrate_streaming
from optimum_heapr.calibration.work import CalibrationWork
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.checkpoints.outline import load_outline
from optimum_heapr.estimate import estimate
from optimum_heapr.layerwise.source import SourceCheckpoint
from optimum_heapr.utils.tensor_files import TensorReader, checkpoint_files
from tests.helpers import calibration_data, repository, tiny_model


SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


# All layers alike; a shared expert and its gate; a dense layer first; keys and values compressed, of different sizes.
FAMILIES = {"qwen3_moe": SIZES, "qwen2_moe": {}, "deepseek": {}, "deepseek_v2": {}}


def measured(family="qwen3_moe"):
    """A model, calibration data, and what the formulas say of them."""
    model = tiny_model(family, **FAMILIES[family])
    return model, calibration_data(24, 24, 24), CalibrationWork.of(model, HeaprConfig(num_samples=3, seq_length=24))


@pytest.fixture
def small():
    return measured()


def bmm_flop(left, right, *args, out_shape=None, **kwargs):
    """Without outer products, such as the angles of rotary embeddings: torch 2.9 makes them by this, newer ones do not."""
    return 2 * left[0] * left[1] * left[2] * right[2] if left[2] > 1 else 0


# torch counts neither of these: the product of rows with the matrix of their expert, and attention on a CPU.
def grouped_mm_flop(rows, matrices, *args, out_shape=None, **kwargs):
    return 2 * rows[0] * matrices[-2] * matrices[-1]


def attended(query, *shapes):
    """Shapes of keys and values with the heads of the query, which share them: those of torch 2.9 want that."""
    return query, *((shape[0], query[1], *shape[2:]) for shape in shapes)


COUNTED = {
    torch.ops.aten.bmm: bmm_flop,
    torch.ops.aten._grouped_mm: grouped_mm_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *args, out_shape=None, **kwargs: sdpa_flop_count(*attended(query, key, value))
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *args, out_shape=None, **kwargs: sdpa_backward_flop_count(
            gradient, *attended(query, key, value)
        )
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["plain", "offload"])
def test_operations_are_those_counted(mode, family):
    model, data, run = measured(family)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        calibrate(model, data, checkpointing=mode == "offload")
    counted = counter.get_flop_counts()["Global"]
    assert {torch.ops.aten.mm, torch.ops.aten._grouped_mm} <= set(counted), "the kernels that the formulas are about"
    expected = run.flops(mode)
    if family == "deepseek_v2":  # keys and values of different sizes: no fused kernel, which computes weights again
        expected -= run.tokens * sum(layer.attention // 2 for layer in run.layers[2:])
    assert counter.get_total_flops() == expected


def test_bytes_are_those_there_are(small, tmp_path):
    model, data, run = small
    assert run.bytes_read("plain") == sum(parameter.nbytes for parameter in model.parameters())
    assert sum(layer.num_bytes for layer in run.layers) == sum(p.nbytes for p in model.model.layers.parameters())
    vectors = calibrate(model, data).blocks
    assert run.statistics_bytes == sum(t.nbytes for block in vectors.values() for t in block.sums.values())
    both = calibrate(model, data, gram=True).blocks
    assert run.matrix_bytes + run.statistics_bytes == sum(
        t.nbytes for block in both.values() for t in block.sums.values()
    )


def test_of_a_mixture_vectors_are_there_for_each_source(small):
    model, data, _ = small
    run = CalibrationWork.of(model, HeaprConfig(dataset="a,b", num_samples=3, seq_length=24))
    vectors = calibrate(model, dataclasses.replace(data, origins=["a", "b", "a"])).blocks
    assert run.statistics_bytes == sum(t.nbytes for block in vectors.values() for t in block.sums.values())


def test_offloaded_layers_are_read_twice_a_micro_batch(small, tmp_path, monkeypatch):
    model, data, run = small
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{number}": "disk" for number in range(3)}
    options = {"device_map": places, "offload_folder": tmp_path / "offload", "dtype": "auto"}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    names, get = [], OffloadedWeightsLoader.__getitem__

    def recorded(self, name):
        tensor = get(
            self, name
        )  # raises for what is only asked for: accelerate 1.10 looks for scales of 8-bit weights
        names.append(name)
        return tensor

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", recorded)
    calibrate(offloaded, data)
    # The norms of the weights are a statistic as well, and take one more reading of the experts.
    norms = sum(sizes[name] for name in sizes if "mlp.experts" in name)
    assert sum(map(sizes.__getitem__, names)) == run.bytes_read("offload") - run.rest_bytes + norms


def test_streamed_layers_are_read_twice_in_all(small, tmp_path, monkeypatch):
    model, data, run = small
    model.save_pretrained(tmp_path / "model")
    skeleton, _ = load_model(tmp_path / "model", skeleton=True)
    source, size, read = SourceCheckpoint(skeleton, checkpoint_files(str(tmp_path / "model"))), [], TensorReader.read

    def counted(self, *args, **options):
        tensor = read(self, *args, **options)
        size.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(TensorReader, "read", counted)
    (tmp_path / "work").mkdir()
    calibrate_streaming(skeleton, source, data, tmp_path / "work", batch_size=1)
    # The model is told from others by the first expert of each layer, which is read once more.
    told_by = SIZES["num_hidden_layers"] * SIZES["moe_intermediate_size"] * SIZES["hidden_size"] * 4
    assert sum(size) == run.bytes_read("streaming") + told_by


COMMON = {
    "vocab_size": 151_936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
MODELS = {
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        moe_intermediate_size=768,
        intermediate_size=6144,
        **COMMON,
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        hidden_size=4096,
        num_hidden_layers=94,
        num_attention_heads=64,
        moe_intermediate_size=1536,
        intermediate_size=12_288,
        **COMMON,
    ),
}


def gib(size):
    return f"{size / 2**30:,.2f}" if size < 10 * 2**30 else f"{size / 2**30:,.0f}"


@pytest.mark.parametrize("name", MODELS)
def test_the_documentation_has_the_figures(name, tmp_path):
    MODELS[name].save_pretrained(tmp_path)
    page = (repository() / "docs" / "source" / "guides" / "large_models.md").read_text(encoding="utf-8")
    found = estimate(tmp_path, HeaprConfig(num_samples=128, seq_length=2048))
    work = CalibrationWork.of(load_outline(tmp_path), HeaprConfig(num_samples=128, seq_length=2048))
    for way in found.calibration:
        cells = [name, way.mode, f"{way.flops / 1e15:,.2f}", gib(way.bytes_read), gib(way.weights)]
        cells += [
            gib(way.layer_inputs) if way.layer_inputs else "",
            gib(work.statistics_bytes),
            gib(work.matrix_bytes),
        ]
        assert f"| {' | '.join(cells)} |" in page
