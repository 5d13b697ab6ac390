# Licensed under the Apache License, Version 2.0
"""Calibration text that is read as a stream: only as far as needed, the same for every process, from the same columns."""

import itertools
import json

import datasets
import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprError
from optimum_heapr.text.samples import load_calibration_data
from tests.helpers import CHAT_TEMPLATE, SENTENCES, tiny_tokenizer


TEXTS = [f"{number} {SENTENCES[number % len(SENTENCES)]}" for number in range(1500)]  # more than the buffer holds


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """`datasets` gives its threads five seconds to end whenever a stream is left."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same texts in every kind of file whose rows are documents."""
    folder = tmp_path_factory.mktemp("files")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.to_json(folder / "a.jsonl")
    rows.to_parquet(folder / "a.parquet")
    rows.to_csv(folder / "a.csv")
    return folder


def load(dataset, tokenizer, **options):
    config = HeaprConfig(
        **{"num_samples": 2000, "seq_length": 64, "packing": False, "dataset_streaming": True, **options}
    )
    return load_calibration_data(config, tokenizer, dataset)


def documents(data, tokenizer):
    return [tokenizer.decode(sample).removesuffix("<|end|>") for sample in data.samples]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_a_stream_holds_what_the_file_holds(suffix, files, tokenizer):
    streamed = documents(load(str(files / f"a.{suffix}"), tokenizer), tokenizer)
    assert streamed != TEXTS and sorted(streamed) == sorted(TEXTS)
    whole = documents(load(str(files / f"a.{suffix}"), tokenizer, dataset_streaming=False), tokenizer)
    assert streamed != whole and sorted(streamed) == sorted(whole)


def test_a_text_file_is_one_document(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("One.\nTwo.")
    assert documents(load(str(tmp_path / "a.txt"), tokenizer), tokenizer) == ["One.\nTwo."]


@pytest.mark.parametrize("packing", [True, False])
def test_the_samples_are_those_of_the_seed_in_every_process(packing, files, tokenizer, monkeypatch):
    options = {"packing": packing, "num_samples": 20}
    first = load(str(files / "a.jsonl"), tokenizer, **options)
    for rank in ("0", "1"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        assert load(str(files / "a.jsonl"), tokenizer, **options).fingerprint == first.fingerprint
    other = load(str(files / "a.jsonl"), tokenizer, seed=1, **options)
    assert other.fingerprint["sha256"] != first.fingerprint["sha256"]
    assert {len(sample) for sample in first.samples} == {64} if packing else max(map(len, first.samples)) < 64


def test_no_more_is_read_than_it_takes(tokenizer):
    """A stream without an end; one row is looked at first, and the buffer is filled before the first document."""
    read = []

    def rows():
        for number in itertools.count():
            read.append(number)
            yield {"text": f"Document {number}."}

    data = load(datasets.IterableDataset.from_generator(rows), tokenizer, num_samples=30)
    assert len(data.samples) == 30
    assert max(read) < 1000 + 30 + 2


def test_a_mixture_of_streams(files, tmp_path, tokenizer):
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"b{number}"}) + "\n" for number in range(40)))
    mixture = f"{files / 'a.parquet'}:3,{tmp_path / 'b.jsonl'}:1"
    data = load(mixture, tokenizer, num_samples=12)
    assert [share["num_samples"] for share in data.fingerprint["sources"]] == [9, 3]
    assert sum(text.startswith("b") for text in documents(data, tokenizer)) == 3
    assert data.fingerprint == load(mixture, tokenizer, num_samples=12).fingerprint


def test_token_ids_are_taken_in_their_order(tmp_path):
    rows = [{"input_ids": [number, number + 1, 2]} for number in range(50)]
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(str(path), None, num_samples=3)
    assert [sample.tolist() for sample in data.samples] == [row["input_ids"] for row in rows[:3]]
    assert torch.equal(load(str(path), None, num_samples=3, dataset_streaming=False).samples[2], data.samples[2])


def test_messages_and_pairs_are_found_in_streams(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    (tmp_path / "messages.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Why?"}]}) + "\n")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "How many?", "response": "42"}) + "\n")
    assert documents(load(str(tmp_path / "messages.jsonl"), tokenizer), tokenizer) == ["user: Why?\n"]
    expected = ["user: How many?\nassistant: 42\n"]
    assert documents(load(str(tmp_path / "pairs.jsonl"), tokenizer), tokenizer) == expected


def test_a_dataset_on_the_hub_is_opened_as_a_stream(monkeypatch, tokenizer):
    asked = []

    def load_dataset(name, dataset_config=None, split=None, revision=None, streaming=False):
        asked.append((name, dataset_config, split, streaming))
        rows = datasets.Dataset.from_dict({"text": [" = One = \n", *SENTENCES]})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load("org/name[b/c],wikitext2", tokenizer, num_samples=2).samples) == 2
    # A preset is small, and its lines belong together.
    assert asked == [("org/name", "b", "c", True), ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", False)]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "is empty"),
        ('{"text": "a b c d"}\n' * 3 + '{"text": \n' * 2, r"cannot be loaded \(.*\)"),
        ('{"title": "a", "body": "b"}\n', "has columns title, body; name one of them that holds text"),
        ('{"text": 1}\n', "'text' holds int, not text"),
    ],
)
def test_a_stream_that_cannot_be_used_is_named(content, match, tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(HeaprError, match=match) as error:
        load(str(path), tokenizer)
    assert repr(str(path)) in str(error.value)


def test_a_stream_without_rows_is_refused(tokenizer):
    with pytest.raises(HeaprError, match="dataset='IterableDataset': is empty"):
        load(datasets.IterableDataset.from_generator(lambda: iter(())), tokenizer)
