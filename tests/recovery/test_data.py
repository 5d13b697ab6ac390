# Licensed under the Apache License, Version 2.0
"""What is trained on and what is measured: other documents, whatever the order."""

import datasets
import pytest

from optimum_heapr import HeaprError, RecoveryConfig
from optimum_heapr.recovery.data import RecoveryData
from tests.helpers import SENTENCES, tiny_tokenizer


TEXTS = [f"Document {index}: {sentence}" for index, sentence in enumerate(SENTENCES * 5)]


def load(rows, **options):
    config = RecoveryConfig(**{"num_samples": 1000, "seq_length": 16, "held_out": 0.2, **options})
    return config, RecoveryData.load(config, tiny_tokenizer(), rows)


def documents_in(data, tokenizer):
    text = tokenizer.decode([token for sample in data.samples for token in sample.tolist()])
    return {index for index in range(len(TEXTS)) if f"Document {index}:" in text}


def test_no_document_is_in_both_parts():
    tokenizer = tiny_tokenizer()
    _, data = load(datasets.Dataset.from_dict({"text": TEXTS}))
    training, held_out = documents_in(data.training, tokenizer), documents_in(data.held_out, tokenizer)
    assert training | held_out == set(range(30)) and not training & held_out and len(held_out) == 6


def test_each_source_of_a_mixture_is_divided(tmp_path):
    import json

    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name}{text}"}) + "\n" for text in TEXTS))
    _, data = load(None, dataset=f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}", num_samples=20)
    assert [part["num_samples"] for part in data.held_out.fingerprint["sources"]] == [2, 2]
    assert [part["num_samples"] for part in data.training.fingerprint["sources"]] == [8, 8]


def test_one_document_is_refused():
    with pytest.raises(HeaprError, match="is one document, and recovery holds documents out"):
        load(datasets.Dataset.from_dict({"text": TEXTS[:1]}))


def test_a_stream_is_refused():
    with pytest.raises(HeaprError, match="dataset='IterableDataset': is a stream, and recovery holds documents out"):
        load(datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset())


def test_the_order_takes_all_samples_in_turn():
    config, data = load(datasets.Dataset.from_dict({"text": TEXTS}), max_steps=30, batch_size=8, seed=1)
    order, count = data.order(config), len(data.training.samples)
    assert len(order) == 240 and sorted(order[:count]) == list(range(count)) != order[:count]
    assert order == data.order(config) != data.order(config.replace(seed=2))
