# Licensed under the Apache License, Version 2.0
"""Experts of Qwen3-VL-MoE are written the way round in which its checkpoints store them, which transformers 5 does not do itself."""

import pytest
import torch
from safetensors import safe_open

from optimum_heapr import HeaprError, HeaprPruner
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.checkpoints.orientation import written_as_stored
from optimum_heapr.checkpoints.saving import apply_streaming
from tests.surgery.stock_models import WIDTH, layout_plan, logits_of, wide_model


HIDDEN = 40
LAYER = "model.language_model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint as those on the Hub are, and the logits of the model that it was made from."""
    folder, model = tmp_path_factory.mktemp("source") / "model", wide_model("qwen3_vl_moe")
    expected = logits_of(model)
    written_as_stored(model)
    model.save_pretrained(folder)
    assert shapes_of(folder) == [(6, HIDDEN, 2 * WIDTH), (6, WIDTH, HIDDEN)]
    loaded, _ = load_model(folder)
    assert torch.equal(logits_of(loaded), expected)
    return folder


def shapes_of(folder) -> list[tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return [tuple(file.get_slice(f"{LAYER}.{name}").get_shape()) for name in ("gate_up_proj", "down_proj")]


def test_stock_layouts_are_stored_as_the_original(source, tmp_path):
    pruner = HeaprPruner.from_pretrained(source)
    plan = layout_plan(pruner.model, "uniform")
    expected = logits_of(pruner.apply(plan))
    pruner.save_pretrained(tmp_path / "memory")
    apply_streaming(source, plan, tmp_path / "stream")
    for way in ("memory", "stream"):
        assert shapes_of(tmp_path / way) == [(6, HIDDEN, 2 * 24), (6, 24, HIDDEN)]
        loaded, _ = load_model(tmp_path / way)
        assert torch.equal(logits_of(loaded), expected)
    first, second = ((tmp_path / way / "model.safetensors").read_bytes() for way in ("memory", "stream"))
    assert first == second


@pytest.mark.parametrize("memory", ["plain", "streaming"])
def test_a_width_that_makes_a_matrix_square_is_refused(memory, tmp_path):
    model = wide_model("qwen3_vl_moe", hidden_size=48)
    plan = layout_plan(model, "uniform")
    model.save_pretrained(tmp_path)
    pruner = HeaprPruner.from_pretrained(tmp_path, memory=memory)
    with pytest.raises(HeaprError, match="at the width 24 and a hidden size of 48 a matrix of .* is square"):
        pruner.apply(plan)
