# Licensed under the Apache License, Version 2.0
"""Calibration text: every way in, how it is cut into samples, and which data are refused."""

import csv
import itertools
import json
import logging

import datasets
import pytest
import torch

from optimum_heapr.configuration import HeaprConfig
from optimum_heapr.text.samples import CalibrationData, by_turns, load_calibration_data, packed
from optimum_heapr.text.sources import open_dataset
from optimum_heapr.utils.errors import HeaprError
from tests.helpers import CHAT_TEMPLATE, SENTENCES, random_samples, tiny_tokenizer


TEXTS = [f"{sentence} ({index})" for index, sentence in enumerate(SENTENCES * 3)]
END = 0  # the id of <|end|>


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def load(dataset, tokenizer=None, **options):
    config = HeaprConfig(**{"num_samples": 1000, "seq_length": 16, **options})
    return load_calibration_data(config, tokenizer, dataset)


def texts_as_dataset(texts=TEXTS, column="text"):
    return datasets.Dataset.from_dict({column: texts})


def stream(data):
    return torch.cat(data.samples).tolist()


def documents_in(data):
    """The documents of a packed stream: what stands between two end tokens."""
    documents, current = [], []
    for token in stream(data):
        if token == END:
            documents.append(current)
            current = []
        else:
            current.append(token)
    assert current == []
    return documents


# Packing


def test_packing_joins_and_cuts_without_loss():
    rows = list(packed(iter([[1, 2, 3], [4], [], [5, 6, 7, 8, 9], [10, 11]]), 4))
    assert [row.tolist() for row in rows] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
    assert all(row.dtype == torch.int64 for row in rows)


@pytest.mark.parametrize(("tokens", "lengths"), [(8, [4, 4]), (9, [4, 4]), (10, [4, 4, 2]), (1, []), (0, [])])
def test_a_remainder_of_less_than_two_tokens_is_dropped(tokens, lengths):
    assert [len(row) for row in packed([list(range(tokens))], 4)] == lengths


def test_packing_reads_no_further_than_asked():
    read = []

    def documents():
        for index in range(100):
            read.append(index)
            yield [index] * 3

    rows = packed(documents(), 5)
    next(rows), next(rows)
    assert len(read) == 4  # 12 tokens are enough for 10


def test_text_is_tokenized_closed_by_the_end_token_and_packed(tokenizer):
    data = load(texts_as_dataset(), tokenizer, seq_length=128)
    assert {len(sample) for sample in data.samples[:-1]} == {128} and 2 <= len(data.samples[-1]) <= 128
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert sorted(documents_in(data)) == sorted(expected)
    assert documents_in(data) != expected, "documents are shuffled"


def test_few_samples_come_from_many_documents():
    """Long documents do not fill the samples by themselves: each gives one piece, then each another."""
    documents = [[100 * index + offset for offset in range(10)] for index in range(1, 6)]
    pieces = list(by_turns(documents, 4, seed=0))
    assert [piece[0] // 100 for piece in pieces[:5]] == [1, 2, 3, 4, 5] == [piece[0] // 100 for piece in pieces[5:10]]
    assert sorted(pieces) == sorted(ids[start : start + 4] for ids in documents for start in (0, 4, 8)), "all, once"
    assert len({piece[0] % 100 for piece in pieces[:5]}) > 1, "not the beginning of each"
    assert pieces == list(by_turns(documents, 4, seed=0)) != list(by_turns(documents, 4, seed=1))


def test_turns_read_no_further_than_asked():
    def documents():
        yield from ([index] * 10 for index in range(3))
        raise AssertionError("read too far")

    assert [piece[0] for piece in itertools.islice(by_turns(documents(), 4, seed=0), 3)] == [0, 1, 2]


def test_long_documents_share_the_samples(tokenizer):
    data = load(
        texts_as_dataset([f"{sentence} " * 50 for sentence in SENTENCES]), tokenizer, num_samples=len(SENTENCES)
    )
    common = [set(tokenizer(sentence)["input_ids"]) for sentence in SENTENCES]
    found = [
        {index for index, ids in enumerate(common) if set(sample.tolist()) <= ids | {END}} for sample in data.samples
    ]
    assert set().union(*found) == set(range(len(SENTENCES)))


def test_the_order_is_that_of_the_seed(tokenizer):
    rows = texts_as_dataset()
    first, again, other = (load(rows, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert stream(first) == stream(again) != stream(other)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    load(rows, tokenizer, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"


def test_no_more_samples_than_asked(tokenizer):
    everything = load(texts_as_dataset(), tokenizer)
    few = load(texts_as_dataset(), tokenizer, num_samples=3)
    assert [sample.tolist() for sample in few.samples] == [sample.tolist() for sample in everything.samples[:3]]
    assert few.fingerprint["num_samples"] == 3 and few.fingerprint["num_tokens"] == 48


def test_fewer_samples_than_asked_are_reported(tokenizer, heapr_log):
    data = load(texts_as_dataset(TEXTS[:2]), tokenizer, num_samples=500)
    assert f"gives only {len(data.samples)} of the 500 samples asked for" in heapr_log.text
    heapr_log.clear()
    load(texts_as_dataset(), tokenizer, num_samples=2)
    assert heapr_log.text == ""


def test_empty_documents_are_left_out(tokenizer):
    data = load(datasets.Dataset.from_dict({"text": ["", TEXTS[0], None, TEXTS[1], ""]}), tokenizer, seq_length=128)
    assert sorted(documents_in(data)) == sorted(tokenizer(text)["input_ids"] for text in TEXTS[:2])


def test_a_long_document_gives_no_warning_about_its_length(tokenizer, caplog):
    """It is cut later; the tokenizer's warning that it exceeds the model's length would only worry people."""
    assert tokenizer.model_max_length == 128
    with caplog.at_level(logging.WARNING):
        load(texts_as_dataset(["word " * 500]), tokenizer, num_samples=2)
    assert "longer than" not in caplog.text


def test_another_text_column(tokenizer):
    data = load(texts_as_dataset(column="body"), tokenizer, text_column="body")
    assert stream(data) == stream(load(texts_as_dataset(), tokenizer))


# Token ids


def test_input_ids_are_used_as_they_are():
    rows = [[5, 6, 7], [8, 9], list(range(40))]
    data = load(datasets.Dataset.from_dict({"input_ids": rows, "text": ["a", "b", "c"]}), None, seq_length=4)
    assert [sample.tolist() for sample in data.samples] == rows, "neither cut nor joined, no end token, in order"
    assert all(sample.dtype == torch.int64 for sample in data.samples)
    assert len(load(datasets.Dataset.from_dict({"input_ids": rows}), None, num_samples=2).samples) == 2


# Messages


MESSAGES = [
    [{"role": "user", "content": "The quick fox?"}, {"role": "assistant", "content": "The lazy dog."}],
    [{"role": "user", "content": "How many experts?"}, {"role": "assistant", "content": "42"}],
]


def test_messages_are_rendered_by_the_chat_template():
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    rows = datasets.Dataset.from_dict({"messages": MESSAGES, "text": ["not", "this"]})
    documents = {tokenizer.decode(ids) for ids in documents_in(load(rows, tokenizer, seq_length=128))}
    assert documents == {
        "user: The quick fox?\nassistant: The lazy dog.\n",
        "user: How many experts?\nassistant: 42\n",
    }


def test_messages_without_a_chat_template_are_refused(tokenizer):
    with pytest.raises(HeaprError, match="holds messages but the tokenizer has no chat template; use text"):
        load(datasets.Dataset.from_dict({"messages": MESSAGES}), tokenizer)


# Files


def write_files(folder):
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "data.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    with open(folder / "data.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text"], *([text] for text in TEXTS)])
    texts_as_dataset().to_parquet(folder / "data.parquet")
    texts_as_dataset().save_to_disk(folder / "saved")
    (folder / "many").mkdir()
    (folder / "many" / "train.jsonl").write_text((folder / "data.jsonl").read_text())
    datasets.DatasetDict({"train": texts_as_dataset(), "test": texts_as_dataset(TEXTS[:1])}).save_to_disk(
        folder / "dict"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_files(path)
    return path


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv", "data.parquet", "saved", "many", "dict"])
def test_every_kind_of_file_gives_the_same_samples(folder, tokenizer, name):
    data = load(str(folder / name), tokenizer, seed=3)
    expected = load(texts_as_dataset(), tokenizer, seed=3)
    assert stream(data) == stream(expected)
    assert data.source == str(folder / name) and expected.source == "Dataset"


def test_a_path_object_will_do(folder, tokenizer):
    assert stream(load(folder / "data.jsonl", tokenizer)) == stream(load(str(folder / "data.jsonl"), tokenizer))


def test_the_configuration_names_the_data_unless_they_are_given(folder, tokenizer):
    config = HeaprConfig(dataset=str(folder / "data.jsonl"), num_samples=4, seq_length=16)
    assert load_calibration_data(config, tokenizer).source == str(folder / "data.jsonl")
    assert load_calibration_data(config, tokenizer, texts_as_dataset()).source == "Dataset"


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_document(tmp_path, tokenizer, suffix):
    (tmp_path / f"text{suffix}").write_text("\n\n".join(SENTENCES))
    data = load(str(tmp_path / f"text{suffix}"), tokenizer, seq_length=1024)
    assert [tokenizer.decode(ids) for ids in documents_in(data)] == ["\n\n".join(SENTENCES)]


def test_the_split_of_a_saved_collection(folder):
    assert len(open_dataset(folder / "dict", split="test")) == 1
    with pytest.raises(HeaprError, match=r"dict': cannot be loaded .*\"validation\".*'train', 'test'"):
        open_dataset(folder / "dict", split="validation")


def test_a_list_of_texts_is_data(tokenizer):
    texts = ["one text about this", "another about that"]
    config = HeaprConfig(num_samples=2, seq_length=8)
    expected = load_calibration_data(config, tokenizer, texts_as_dataset(texts)).samples
    for text_column in ("text", "body"):
        found = load_calibration_data(config.replace(text_column=text_column), tokenizer, texts).samples
        assert [sample.tolist() for sample in found] == [sample.tolist() for sample in expected]


# What is refused


def refused(match, dataset, tokenizer=None, **options):
    with pytest.raises(HeaprError, match=match) as error:
        load(dataset, tokenizer, **options)
    assert "\n" not in str(error.value)


def test_no_data_at_all_is_refused(tokenizer):
    for wrong in ([], [1, 2], {"text": "one"}, 3, datasets.DatasetDict({"train": texts_as_dataset(["one text"])})):
        with pytest.raises(HeaprError, match=f"dataset: is of type {type(wrong).__name__}; pass a path"):
            load_calibration_data(HeaprConfig(), tokenizer, wrong)
    refused("dataset=None: name the text, a local file or a dataset on the Hub", None, tokenizer)


def test_an_empty_dataset_is_refused(tmp_path, tokenizer):
    refused("dataset='Dataset': is empty", texts_as_dataset([]), tokenizer)
    refused("dataset='Dataset': is empty", datasets.Dataset.from_dict({"input_ids": []}))
    for name in ("empty.jsonl", "empty.json", "empty.csv", "empty.txt", "empty.parquet"):
        (tmp_path / name).write_text("")
        refused(rf"dataset='.*{name}': is empty; name one with text in it", tmp_path / name, tokenizer)
    (tmp_path / "header.csv").write_text("text\n")
    refused(r"dataset='.*header\.csv': cannot be loaded \(.*no data", tmp_path / "header.csv", tokenizer)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text("")
    refused(r"dataset='.*folder': cannot be loaded", tmp_path / "folder", tokenizer)


@pytest.mark.parametrize("content", ["\n", "\n\n", " ", "[]", "{}"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_file_with_nothing_in_it_is_refused(tmp_path, tokenizer, content, suffix):
    (tmp_path / f"blank{suffix}").write_text(content)
    match = r"dataset='.*blank\.jsonl?': (is empty|cannot be loaded|holds less)|text_column='text'"
    refused(match, tmp_path / f"blank{suffix}", tokenizer)


def test_a_dataset_of_empty_texts_is_refused(tokenizer):
    refused("dataset='Dataset': holds less than two tokens; every sample needs", texts_as_dataset(["", ""]), tokenizer)


def test_samples_shorter_than_two_tokens_are_refused():
    for rows, index, length in (([[1, 2], [3]], 1, 1), ([[1, 2], [], [3]], 1, 0), ([[7]], 0, 1)):
        match = f"sample {index} has {length} tokens; every sample needs at least two, one to predict from the other"
        refused(match, datasets.Dataset.from_dict({"input_ids": rows}))


def test_a_missing_file_is_refused(tmp_path, tokenizer):
    for name in ("missing.jsonl", "data/missing.parquet", str(tmp_path / "missing"), "./missing", "../missing"):
        refused(rf"dataset='{name}': no such file or folder", name, tokenizer)


def test_a_name_that_is_neither_a_file_nor_on_the_hub_is_refused(tokenizer):
    refused("dataset='nobody/nothing': cannot be loaded", "nobody/nothing", tokenizer)


def test_an_unknown_kind_of_file_is_refused(tmp_path, tokenizer):
    (tmp_path / "data.xml").write_text("<text/>")
    refused(r"data\.xml': unknown kind of file; use one of \.jsonl, \.json", tmp_path / "data.xml", tokenizer)


@pytest.mark.parametrize("name", ["broken.jsonl", "broken.parquet"])
def test_a_broken_file_is_refused(tmp_path, tokenizer, name):
    (tmp_path / name).write_text('{"text": "a"}\n{"text": ')
    refused(rf"{name}': cannot be loaded \(", tmp_path / name, tokenizer)


def test_a_missing_column_is_refused_naming_those_there_are(tokenizer):
    rows = datasets.Dataset.from_dict({"body": TEXTS, "title": TEXTS})
    refused(
        "text_column='text': 'Dataset' has columns body, title; name one of them that holds text, or use messages",
        rows,
        tokenizer,
    )
    refused("text_column='words': .* has columns body, title", rows, tokenizer, text_column="words")


def test_text_without_a_tokenizer_is_refused():
    refused("holds text but the model has no tokenizer; pass one, or input_ids", texts_as_dataset())


# Micro-batches


def test_micro_batches_are_padded_on_the_right():
    samples = random_samples(3, 5, 2, 4, 4)
    batches = list(CalibrationData(samples, "x", 0, 5).micro_batches(2))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 5), (2, 4), (1, 4)]
    seen = []
    for batch in batches:
        for ids, mask, index in zip(batch["input_ids"], batch["attention_mask"], batch["sample_index"].tolist()):
            length = len(samples[index])
            assert ids[:length].tolist() == samples[index].tolist()
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            seen.append(index)
    assert seen == [0, 1, 2, 3, 4]


def test_the_demonstration_text_can_be_named(tokenizer):
    rows = open_dataset("demo")
    assert rows.column_names == ["text"] and len(rows) > 10
    assert set(rows["text"]).isdisjoint(open_dataset("demo", demo_split="evaluation")["text"])


def test_the_shares_of_a_mixture_are_counted_in_one_pass():
    compared = []

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(other)
            return str(self) == str(other)

    samples = [torch.zeros(2 + index % 3, dtype=torch.int64) for index in range(300)]
    data = CalibrationData(samples, "mixture", 0, 4, [Name("ab"[index % 2]) for index in range(300)])
    assert data.fingerprint["sources"] == [
        {"name": name, "num_samples": 150, "num_tokens": 450} for name in ("a", "b")
    ]
    assert len(compared) < 4 * 300
