# Licensed under the Apache License, Version 2.0
"""Offloaded weights and checkpointed layers give the same statistics."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.layerwise.memory import checkpointed_layers, has_offloaded_weights
from tests.calibration.test_runner import model_in_an_uncommon_state, snapshot
from tests.helpers import assert_same_statistics, calibration_data, tiny_model


DATA = (8, 5, 7)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2"])
def test_checkpointed_layers_give_the_same_statistics(family):
    data = calibration_data(*DATA)
    model = tiny_model(family, dtype=torch.float64)
    plain = calibrate(model, data, batch_size=2, gram=True)
    calls = []
    model.model.layers[-1].mlp.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = calibrate(model, data, batch_size=2, gram=True, checkpointing=True)
    assert len(calls) == 4, "every layer is computed twice"
    assert_same_statistics(checkpointed, plain)
    for path, block in plain.blocks.items():
        torch.testing.assert_close(checkpointed.blocks[path].activation_gram_sum, block.activation_gram_sum)
    assert checkpointed.fingerprint == plain.fingerprint


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_statistics(place, tmp_path):
    model, data = tiny_model(), calibration_data(*DATA)
    plain = calibrate(model, data, batch_size=2)
    model.save_pretrained(tmp_path / "model")
    parts = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    layers = {"model.layers.0": place, "model.layers.1": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**parts, **layers}, offload_folder=tmp_path / "offload", dtype="auto"
    )
    assert has_offloaded_weights(offloaded) and not has_offloaded_weights(model)
    before = snapshot(offloaded)
    statistics = calibrate(offloaded, data, batch_size=2)
    assert snapshot(offloaded) == before
    assert_same_statistics(statistics, plain, rtol=1e-6)
    for path, block in plain.blocks.items():
        assert torch.equal(statistics.blocks[path].weight_norm, block.weight_norm)
    experts = [parameter for name, parameter in offloaded.named_parameters() if "layers.1.mlp.experts" in name]
    assert all(parameter.device.type == "meta" for parameter in experts), "weights were dropped behind the layer"


def test_the_weights_of_one_layer_at_a_time_are_in_memory(tmp_path):
    """Without the second forward running to its end, the weights of all layers would stay."""
    tiny_model(num_hidden_layers=4).save_pretrained(tmp_path / "model")
    parts = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    layers = {f"model.layers.{index}": "disk" for index in range(4)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**parts, **layers}, offload_folder=tmp_path / "offload", dtype="auto"
    )
    most = []

    def count(*_):
        layers = model.model.layers
        most.append(sum(layer.mlp.experts.down_proj.device.type != "meta" for layer in layers))

    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(count)
    calibrate(model, calibration_data(*DATA))
    assert len(most) == 2 * 4 * 3 and max(most) == 0, "experts are there only while they compute"


def test_the_model_comes_back_as_it_was_checkpointed():
    model = model_in_an_uncommon_state()
    before = snapshot(model)
    calibrate(model, calibration_data(*DATA), checkpointing=True)
    assert snapshot(model) == before
    model.gradient_checkpointing_enable()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="something"), checkpointed_layers(model, True):
        raise RuntimeError("something")
    assert snapshot(model) == before and model.model.layers[0].gradient_checkpointing


def test_dropout_stays_off_in_checkpointed_layers():
    data = calibration_data(*DATA)
    plain = calibrate(tiny_model("qwen2_moe", dtype=torch.float64), data)
    model = tiny_model("qwen2_moe", dtype=torch.float64, attention_dropout=0.5).train()
    assert_same_statistics(calibrate(model, data, checkpointing=True), plain)
