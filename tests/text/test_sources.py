# Licensed under the Apache License, Version 2.0
"""Mixtures of sources, presets, dialogues in two columns, and samples of one document."""

import json

import datasets
import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprError
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.cli.tables import statistics_table
from optimum_heapr.text import sources as sources_module
from optimum_heapr.text.mixtures import Source, parse_sources, shares_of
from optimum_heapr.text.samples import load_calibration_data
from optimum_heapr.text.sources import articles, open_dataset, open_source
from tests.helpers import CHAT_TEMPLATE, SENTENCES, assert_same_statistics, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def load(dataset, tokenizer, **options):
    config = HeaprConfig(**{"num_samples": 1000, "seq_length": 16, **options})
    return load_calibration_data(config, tokenizer, dataset)


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


# Reading the string


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", [Source("a.jsonl")]),
        ("org/name", [Source("org/name")]),
        ("org/name[test]", [Source("org/name", split="test")]),
        ("org/name[train[:10%]]:2", [Source("org/name", 2.0, split="train[:10%]")]),
        ("wikitext[wikitext-2-raw-v1/train]", [Source("wikitext", 1.0, "train", "wikitext-2-raw-v1")]),
        (
            "a.jsonl:0.3,org/name[split]:0.5, code.jsonl:.2",
            [Source("a.jsonl", 0.3), Source("org/name", 0.5, "split"), Source("code.jsonl", 0.2)],
        ),
        ("a.jsonl,b.jsonl", [Source("a.jsonl"), Source("b.jsonl")]),
        ("a:1e-1,b:3", [Source("a", 0.1), Source("b", 3.0)]),
        ("x[a,b]:1,y:1", [Source("x", split="a,b"), Source("y")]),
        ("s3:data,b", [Source("s3:data"), Source("b")]),
        (r"C:\data\a.jsonl:0.5,b:0.5", [Source(r"C:\data\a.jsonl", 0.5), Source("b", 0.5)]),
    ],
)
def test_strings_are_read(text, expected):
    assert parse_sources(text) == expected


def test_what_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:0.5", "b,c.jsonl", "d[train].jsonl", "e[train]"):
        write_texts(tmp_path / name, ["x"])
        assert parse_sources(name) == [Source(name)]
    assert parse_sources("a:0.5:2,e[train]:1") == [Source("a:0.5", 2.0), Source("e[train]", 1.0)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_is_no_pattern(streaming, tmp_path):
    folder = tmp_path / "a [b], c*:2?"
    folder.mkdir()
    for name in ("text [x].jsonl", "text x.jsonl"):
        write_texts(folder / name, [name])
    rows = open_dataset(str(folder / "text [x].jsonl"), streaming=streaming)
    assert [row["text"] for row in rows] == ["text [x].jsonl"]
    with pytest.raises(HeaprError, match="for a pattern: rename it, or name the files in it"):
        open_dataset(str(folder), streaming=streaming)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a:0.5,b", "'b' has no weight; give all sources one, as in name:0.5, or none"),
        ("a:0,b:1", "'a' has the weight 0; weights are positive numbers"),
        ("a:-1,b:1", "'a' has the weight -1"),
        ("a:nan,b:1", "'a' has the weight nan"),
        ("a:1e999,b:1", "'a' has the weight inf"),
        ("a,,b", "a name is missing; write name"),
        ("a,", "a name is missing"),
        ("", "a name is missing"),
        ("a:1,b:1,a:1", "names 'a' twice"),
    ],
)
def test_strings_that_make_no_sense_are_refused(text, match):
    with pytest.raises(HeaprError, match=match):
        parse_sources(text)


def test_two_splits_of_one_dataset_are_two_sources():
    assert [source.label for source in parse_sources("a[x]:1,a[y]:1,b[c/z]:1")] == ["a[x]", "a[y]", "b[c/z]"]


# Shares


@pytest.mark.parametrize(
    ("weights", "samples", "expected"),
    [
        ((0.3, 0.5, 0.2), 10, [3, 5, 2]),
        ((0.1, 0.2, 0.7), 10, [1, 2, 7]),
        ((1, 1, 1), 10, [4, 3, 3]),
        ((3, 5, 2), 128, [38, 64, 26]),  # 38.4, 64, 25.6
        ((1,), 7, [7]),
    ],
)
def test_samples_are_shared_out_by_largest_remainders(weights, samples, expected):
    assert shares_of([Source(str(index), weight) for index, weight in enumerate(weights)], samples) == expected


def test_a_source_that_would_give_no_sample_is_refused():
    with pytest.raises(
        HeaprError, match="num_samples=10: too few for 'b' with 0.99% of the weight; raise num_samples"
    ):
        shares_of([Source("a", 1), Source("b", 0.01)], 10)


def test_a_mixture_has_the_asked_number_of_each(tmp_path, tokenizer):
    first = write_texts(tmp_path / "a.jsonl", [f"alpha {i} " * 20 for i in range(40)])
    second = write_texts(tmp_path / "b.jsonl", [f"beta {i} " * 20 for i in range(40)])
    mixture = f"{first}:3,{second}:1"
    data = load(mixture, tokenizer, num_samples=12)
    shares = data.fingerprint["sources"]
    assert [(share["name"], share["num_samples"]) for share in shares] == [("a.jsonl", 9), ("b.jsonl", 3)]
    assert sum(share["num_tokens"] for share in shares) == data.fingerprint["num_tokens"]
    for sample, origin in zip(data.samples, data.origins):
        assert ("alpha" in tokenizer.decode(sample)) == (origin == str(first))
    assert data.origins != sorted(data.origins), "the sources are mixed"
    alone = load(str(second), tokenizer, num_samples=3)
    mixed = [sample.tolist() for sample, origin in zip(data.samples, data.origins) if origin == str(second)]
    assert sorted(mixed) == sorted(sample.tolist() for sample in alone.samples)


def test_a_mixture_is_that_of_the_seed(tmp_path, tokenizer):
    files = [write_texts(tmp_path / f"{name}.jsonl", SENTENCES) for name in "ab"]
    mixture = ",".join(map(str, files))
    first, again, other = (load(mixture, tokenizer, seed=seed, num_samples=6) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint["sha256"] != other.fingerprint["sha256"]


def test_the_demonstration_text_in_a_mixture(tmp_path, tokenizer):
    file = write_texts(tmp_path / "a.jsonl", SENTENCES)
    data = load(f"demo:1,{file}:1", tokenizer, num_samples=8)
    assert {share["name"]: share["num_samples"] for share in data.fingerprint["sources"]} == {"demo": 4, "a.jsonl": 4}


def test_a_wrong_source_in_a_mixture_is_named(tmp_path, tokenizer):
    with pytest.raises(HeaprError, match=r"dataset='missing\.jsonl': no such file"):
        load("demo:0.5,missing.jsonl:0.5", tokenizer)


def test_the_table_shows_the_share_of_each_source(tmp_path, tokenizer):
    files = [write_texts(tmp_path / f"{name}.jsonl", [f"{name} " * 200] * 9) for name in "ab"]
    data = load(f"{files[0]}:3,{files[1]}:1", tokenizer, num_samples=8)
    lines = statistics_table(calibrate(tiny_model(), data)).splitlines()
    assert "a.jsonl gave 75.0% of the tokens, 6 samples" in lines
    assert "b.jsonl gave 25.0% of the tokens, 2 samples" in lines
    alone = statistics_table(calibrate(tiny_model(), load(str(files[0]), tokenizer, num_samples=2)))
    assert "gave" not in alone


# Presets and splits


@pytest.fixture
def opened(monkeypatch):
    """What would be asked of the Hub."""
    asked = []
    lines = [
        " \n",
        " = One = \n",
        " \n",
        " First . \n",
        " = = Part = = \n",
        " Second . \n",
        " = Two = \n",
        " Third . \n",
    ]

    def load_dataset(name, dataset_config=None, split=None, **options):
        asked.append((name, dataset_config, split))
        return datasets.Dataset.from_dict({"text": lines})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_the_setting_of_the_paper(opened, tokenizer):
    config = HeaprConfig(dataset="wikitext2")
    assert (config.num_samples, config.seq_length, config.seed) == (128, 2048, 0)
    data = load_calibration_data(config, tokenizer)
    assert opened == [("Salesforce/wikitext", "wikitext-2-raw-v1", "train")]
    assert data.source == "wikitext2" and data.fingerprint["sources"][0]["name"] == "wikitext2"
    rows = open_source(Source("wikitext2"))
    assert rows["text"][:] == [" = One = \n \n First . \n = = Part = = \n Second . \n", " = Two = \n Third . \n"]


def test_a_preset_has_its_own_split(opened):
    open_source(Source("wikitext2"), "other", "other")
    assert opened[-1] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")
    with pytest.raises(HeaprError, match=r"dataset='wikitext2\[test\]': the preset has its own split"):
        open_source(Source("wikitext2", split="test"))


def test_a_source_has_its_own_split_and_configuration(opened):
    open_source(Source("org/name"), "config", "train")
    open_source(Source("org/name", split="test"), "config", "train")
    open_source(Source("org/name", split="test", dataset_config="other"), "config", "train")
    assert opened == [("org/name", "config", "train"), ("org/name", "config", "test"), ("org/name", "other", "test")]


def test_articles_without_any_heading():
    assert articles(datasets.Dataset.from_dict({"text": ["a\n", "b\n"]}))["text"][:] == ["a\nb\n"]


# Dialogues in two columns


@pytest.mark.parametrize("pair", [("prompt", "response"), ("instruction", "output")])
def test_two_columns_are_joined(pair, tokenizer):
    rows = datasets.Dataset.from_dict({pair[0]: ["How many?", "", "Why?"], pair[1]: ["42", "", None]})
    data = load(rows, tokenizer, packing=False)
    assert sorted(tokenizer.decode(sample) for sample in data.samples) == ["How many?\n42<|end|>", "Why?\n<|end|>"]
    templated = load(rows, tiny_tokenizer(chat_template=CHAT_TEMPLATE), packing=False, seq_length=64)
    texts = sorted(tokenizer.decode(sample) for sample in templated.samples)
    assert texts == ["user: How many?\nassistant: 42\n<|end|>", "user: Why?\nassistant: \n<|end|>"]


def test_an_instruction_comes_with_its_input(tokenizer):
    rows = datasets.Dataset.from_dict({"instruction": ["Add.", "Say."], "input": ["1 2", ""], "output": ["3", "a"]})
    data = load(rows, tokenizer, packing=False)
    assert sorted(tokenizer.decode(sample) for sample in data.samples) == ["Add.\n1 2\n3<|end|>", "Say.\na<|end|>"]


def test_the_text_column_goes_before_the_pair(tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["this"], "prompt": ["not"], "response": ["that"]})
    assert tokenizer.decode(load(rows, tokenizer).samples[0]) == "this<|end|>"
    assert tokenizer.decode(load(rows, tokenizer, text_column="prompt").samples[0]) == "not<|end|>"


def test_a_column_that_holds_no_text_is_refused(tokenizer):
    with pytest.raises(HeaprError, match="'text' holds int, not text; name another column"):
        load(datasets.Dataset.from_dict({"text": [1, 2]}), tokenizer)


# One document a sample


def test_without_packing_a_document_is_a_sample(tokenizer):
    rows = datasets.Dataset.from_dict({"text": [*SENTENCES, "", "word " * 100]})
    data = load(rows, tokenizer, packing=False)
    expected = [[*tokenizer(text)["input_ids"], 0][:16] for text in (*SENTENCES, "word " * 100)]
    assert sorted(sample.tolist() for sample in data.samples) == sorted(expected)
    assert len(load(rows, tokenizer, packing=False, num_samples=2).samples) == 2


def test_padding_changes_no_statistic(tokenizer):
    """Documents of different length, one or three in a micro-batch."""
    rows = datasets.Dataset.from_dict({"text": ["a bc", *SENTENCES[:3], "The dog."]})
    data = load(rows, tokenizer, packing=False, seq_length=24)
    assert len({len(sample) for sample in data.samples}) > 2
    model = tiny_model(dtype=torch.float64)
    assert_same_statistics(calibrate(model, data, batch_size=3), calibrate(model, data, batch_size=1))


def test_the_presets_are_documented():
    help = HeaprConfig.__dataclass_fields__["dataset"].metadata["help"]
    assert all(name in help for name in sources_module.PRESETS)
