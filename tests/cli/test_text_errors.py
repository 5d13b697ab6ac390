# Licensed under the Apache License, Version 2.0
"""Text that cannot be read, as the command line says so: one line, status 2, nothing left behind. A row is one kind."""

import json

import pytest

from tests.cli.conftest import listing
from tests.cli.test_errors import check


def rows(*values) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


DIALOGUE = [{"role": "user", "content": "Hello"}]

# What is wrong: (name of the file, its content, words of the line)
TEXTS = {
    "JSON lines in Latin-1": (
        "x.jsonl",
        '{"text": "café"}\n'.encode("latin-1"),
        ["UnicodeDecodeError", "save it as UTF-8"],
    ),
    "prose in Latin-1": ("x.txt", "café\n".encode("latin-1"), ["UnicodeDecodeError", "save it as UTF-8"]),
    "a number for text": ("x.jsonl", rows({"text": 3}), ["row 0", "'text' holds int, not text"]),
    "a dialogue as a string": (
        "x.jsonl",
        rows({"text": json.dumps(DIALOGUE)}),
        ["row 0", "as a JSON string", "'messages'"],
    ),
    "a dialogue without a template": ("x.jsonl", rows({"conversations": DIALOGUE}), ["no chat template"]),
    "no token ids": ("x.jsonl", rows({"input_ids": None}), ["row 0", "input_ids=null", "one list of token ids"]),
    "nested token ids": ("x.jsonl", rows({"input_ids": [[1, 2], [3]]}), ["row 0", "input_ids=[[1, 2]", "one list"]),
    "fractions for token ids": ("x.jsonl", rows({"input_ids": [1.5, 2.5]}), ["row 0", "input_ids=[1.5", "one list"]),
    "token ids beyond the vocabulary": ("x.jsonl", rows({"input_ids": [1, 99_999]}), ["sample 0", "99999"]),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_that_cannot_be_read_is_one_line(kind, run, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, content, named = TEXTS[kind]
    (tmp_path / name).write_bytes(content)
    before = listing(tmp_path)
    flags = ["-m", inputs.model, "-o", tmp_path / "out", "--dataset", name, "--seq-length", 8, "--num-samples", 1]
    for command in ("calibrate", "prune"):
        check(run(command, *flags), command, [f"{name}'", *named])
        assert listing(tmp_path) == before
