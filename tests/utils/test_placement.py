# Licensed under the Apache License, Version 2.0
"""Models without storage."""

import threading

import torch
from transformers import AutoModelForCausalLM

from optimum_heapr.utils.placement import without_storage
from tests.helpers import tiny_model


def test_nothing_is_initialised_and_weights_are_tied(monkeypatch):
    config = tiny_model(tie_word_embeddings=True).config
    drawn = []
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, *_, **__: drawn.append(tensor) or tensor)
    model = without_storage(lambda: AutoModelForCausalLM.from_config(config))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"} and not drawn
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_models_of_other_threads_are_initialised_meanwhile():
    expected, config, made = tiny_model(), tiny_model().config, []
    inside, done = threading.Event(), threading.Event()

    def make():
        inside.set()
        assert done.wait(60)
        return AutoModelForCausalLM.from_config(config)

    thread = threading.Thread(target=lambda: made.append(without_storage(make)))
    thread.start()
    assert inside.wait(60)
    meanwhile = tiny_model()
    done.set()
    thread.join()
    assert made[0].lm_head.weight.is_meta
    for name, tensor in expected.state_dict().items():
        assert torch.equal(meanwhile.state_dict()[name], tensor), name
