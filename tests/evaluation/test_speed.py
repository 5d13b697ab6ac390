# Licensed under the Apache License, Version 2.0
"""Speed of a model whose speed is known, and the greedy generation that it is measured with."""

import time
from types import SimpleNamespace

import pytest
import torch

from optimum_heapr import HeaprError
from optimum_heapr.evaluation import speed as speed_module
from optimum_heapr.evaluation.speed import greedy_tokens, measure_speed
from optimum_heapr.utils.memory import peak_memory, reset_peak_memory
from tests.helpers import random_ids, tiny_model


class Clockwork(torch.nn.Module):
    """Takes 40 ms for a prompt and 5 ms for each token after the first."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 2)
        self.generation_config = SimpleNamespace(pad_token_id=None)
        self.seen = []

    def get_input_embeddings(self):
        return self.embedding

    def generate(self, input_ids, max_new_tokens, **_):
        assert not self.training
        self.seen.append(input_ids)
        time.sleep(0.04 + 0.005 * (max_new_tokens - 1))
        return torch.cat([input_ids, input_ids.new_zeros(len(input_ids), max_new_tokens)], 1)


def test_speed_is_that_of_the_clock():
    model = Clockwork().train()
    prompts = [torch.full((100,), index % 4) for index in range(4)]
    speed = measure_speed(model, prompts, new_tokens=20, batch_size=2, repetitions=3)
    assert speed.prefill == pytest.approx(2 * 100 / 0.04, rel=0.25)
    assert speed.decode == pytest.approx(2 * 20 / (20 * 0.005), rel=0.25)
    assert (speed.prompt_tokens, speed.new_tokens, speed.batch_size, speed.repetitions) == (100, 20, 2, 3)
    assert speed.device.startswith("CPU") and speed.peak_bytes is None
    assert 0 <= speed.decode_spread < 0.5 and model.training
    assert len(model.seen) == 2 * (1 + 3)  # one run warms up
    assert [int(ids[0, 0]) for ids in model.seen[::2]] == [0, 2, 0, 2]  # prompts in turn


def test_the_peak_is_that_of_the_accelerator(monkeypatch):
    made_up = {"measured_devices": lambda: range(1), "peak_memory": lambda: 123, "reset_peak_memory": lambda: None}
    for name, answer in made_up.items():
        monkeypatch.setattr(speed_module, name, answer)
    prompts = [torch.zeros(5, dtype=torch.int64)]
    assert measure_speed(Clockwork(), prompts, new_tokens=1, repetitions=1).peak_bytes == 123


@torch.no_grad()
def test_greedy_tokens_are_the_most_probable_ones():
    model, ids = tiny_model(), random_ids(2, 7)
    model.generation_config.do_sample, model.generation_config.temperature = True, 2.0
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
    # Its end-of-text token must not end it early, whatever it is.
    model.generation_config.eos_token_id = int(expected[0, 8])
    forced = greedy_tokens(model, ids, 6)
    assert forced.shape == (2, 6) and torch.equal(forced[:, 0], expected[:, 7])
    model.generation_config.eos_token_id = None
    assert torch.equal(greedy_tokens(model, ids, 6), expected[:, 7:])
    model.generation_config.eos_token_id = int(expected[0, 8])
    assert greedy_tokens(model, ids[:1], 6, stop=True).shape[1] <= 2


@pytest.mark.parametrize(
    "prompts, options, problem",
    [
        ([5], {"repetitions": 0}, "repetitions=0: must be at least 1"),
        ([5], {"new_tokens": 0}, "new_tokens=0: must be at least 1"),
        ([5], {"batch_size": 2}, "batch_size=2: needs as many prompts of one length, and there are 1"),
        ([5, 6], {}, r"there are 2 of \[5, 6\] tokens"),
        ([], {}, "there are 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(prompts, options, problem):
    with pytest.raises(HeaprError, match=problem):
        measure_speed(Clockwork(), [torch.zeros(length, dtype=torch.int64) for length in prompts], **options)


def test_the_peak_of_memory_rises_and_can_be_reset():
    block = torch.ones(64 * 2**20 // 4)
    high = peak_memory()
    del block
    reset_peak_memory()
    before = peak_memory()
    assert before <= high
    if before == high:
        pytest.skip("this system does not forget the peak of a process, although 64 MiB were given back")
    block = torch.ones(96 * 2**20 // 4)
    assert peak_memory() >= before + 64 * 2**20
    del block
