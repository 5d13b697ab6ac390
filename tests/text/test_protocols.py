# Licensed under the Apache License, Version 2.0
"""Perplexity as published: one text, one tokenization, full windows."""

import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from optimum_heapr import HeaprError
from optimum_heapr.evaluation.perplexity import evaluate_perplexity
from optimum_heapr.text import protocols
from tests.helpers import SENTENCES, tiny_model, tiny_tokenizer


@pytest.fixture
def asked(monkeypatch):
    """Rows in place of the Hub's, and what was asked of it."""
    asked = []

    def open_dataset(name, config, split, revision=None):
        asked.append((name, config, split, revision))
        return Dataset.from_dict({"text": SENTENCES, "sentence": SENTENCES})

    monkeypatch.setattr(protocols, "open_dataset", open_dataset)
    return asked


@pytest.mark.parametrize("name, between", [("wikitext2", "\n\n"), ("ptb", " ")])
@torch.no_grad()
def test_it_is_the_published_computation(name, between, asked):
    """As in the code of GPTQ: the mean over windows of their mean losses, the remainder of the text left out."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = torch.tensor([tokenizer(between.join(SENTENCES))["input_ids"]])
    losses = []
    for i in range(ids.numel() // 24):
        window = ids[:, i * 24 : (i + 1) * 24]
        losses.append(F.cross_entropy(model(window).logits[0, :-1], window[0, 1:]) * 24)
    expected = math.exp(torch.stack(losses).sum() / (len(losses) * 24))
    found = evaluate_perplexity(model, tokenizer, name, seq_length=24)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5) and found["num_tokens"] == 23 * len(losses)
    assert evaluate_perplexity(model, tokenizer, name, seq_length=24, num_samples=2)["num_tokens"] == 46


def test_the_hub_is_asked_for_the_test_split(asked):
    for name in ("wikitext2", "ptb"):
        evaluate_perplexity(tiny_model(), tiny_tokenizer(), name, seq_length=24, num_samples=1)
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None),
        ("ptb-text-only/ptb_text_only", "penn_treebank", "test", "refs/convert/parquet"),
    ]


def test_less_than_a_window_is_refused(asked):
    with pytest.raises(HeaprError, match="seq_length=5000: 'Salesforce/wikitext' has .* tokens; lower it"):
        evaluate_perplexity(tiny_model(), tiny_tokenizer(), "wikitext2", seq_length=5000)
    with pytest.raises(HeaprError, match="no tokenizer"):
        evaluate_perplexity(tiny_model(), None, "wikitext2")
