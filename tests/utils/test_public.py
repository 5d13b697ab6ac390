# Licensed under the Apache License, Version 2.0
"""Of a path only its end is public."""

import pytest

from optimum_heapr.utils.public import public_data, public_name, public_text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("demo", "demo"),
        ("wikitext2", "wikitext2"),
        ("org/name", "org/name"),
        ("org/name[config/split]:0.5,demo:0.5", "org/name[config/split]:0.5,demo:0.5"),
        ("org/name[train[:10%],test]", "org/name[train[:10%],test]"),
        ("/home/me/a.jsonl", "a.jsonl"),
        ("../mine/a.jsonl", "a.jsonl"),
        ("~/mine/a.jsonl", "a.jsonl"),
        ("projects/mine/a.jsonl", "a.jsonl"),
        ("/home/me/a.jsonl:0.3,org/name[split]:0.7", "a.jsonl:0.3,org/name[split]:0.7"),
        ("/home/me/data[split]:3e-1,/home/you/b.csv:.7", "data[split]:3e-1,b.csv:.7"),
        ("/home/me/a.jsonl + /home/me/b.jsonl", "a.jsonl + b.jsonl"),  # statistics that were merged
    ],
)
def test_only_the_end_of_a_path_is_public(source, expected):
    assert public_name(source) == expected


def test_what_exists_is_a_path_whatever_it_looks_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "a, b.jsonl").touch()
    assert public_name("client/a, b.jsonl") == "a, b.jsonl"
    assert public_name("client") == "client/"  # a folder is no name on the Hub
    (tmp_path / "client" / "c.jsonl").touch()
    assert public_name("client/c.jsonl:1,demo:2") == "c.jsonl:1,demo:2"
    assert public_name(".") == tmp_path.name + "/"


def test_the_parts_of_a_fingerprint_and_the_words_of_an_error_are_public():
    data = {"source": "/home/me/a.jsonl", "sha256": "0", "sources": [{"name": "/home/me/a.jsonl", "num_tokens": 3}]}
    named = {"source": "a.jsonl", "sha256": "0", "sources": [{"name": "a.jsonl", "num_tokens": 3}]}
    assert public_data(data) == named and public_data({}) == {}
    text = (
        "OSError: [Errno 2] No such file: '/home/me/model/a.bin' (see https://huggingface.co/docs/x or 3/4/5, ~/a/b)"
    )
    assert (
        public_text(text) == "OSError: [Errno 2] No such file: 'a.bin' (see https://huggingface.co/docs/x or 3/4/5, b)"
    )
