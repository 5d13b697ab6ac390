# Licensed under the Apache License, Version 2.0
"""Dialogues in whatever form they come are rendered by the chat template, or refused with the row and what it holds."""

import json

import datasets
import pytest

from optimum_heapr import HeaprConfig, RecoveryConfig
from optimum_heapr.evaluation.perplexity import evaluation_windows
from optimum_heapr.recovery.data import RecoveryData
from optimum_heapr.text.samples import load_calibration_data
from optimum_heapr.utils.errors import HeaprError
from tests.helpers import CHAT_TEMPLATE, tiny_tokenizer


STANDARD = [{"role": "user", "content": "The quick fox?"}, {"role": "assistant", "content": "The lazy dog."}]
SHAREGPT = [{"from": "human", "value": "The quick fox?"}, {"from": "gpt", "value": "The lazy dog."}]
RENDERED = "user: The quick fox?\nassistant: The lazy dog.\n"

# As the templates of Mistral and Gemma do.
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}" + CHAT_TEMPLATE
)


def config(path, **options) -> HeaprConfig:
    return HeaprConfig(dataset=str(path), num_samples=2, seq_length=128, packing=False, **options)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column, value", [
    ("messages", STANDARD),
    ("messages", SHAREGPT),
    ("conversations", SHAREGPT),
    ("conversation", STANDARD),
    ("messages", json.dumps(STANDARD)),
    ("conversations", json.dumps(SHAREGPT)),
], ids=str)  # fmt: skip
def test_every_form_of_a_dialogue_renders_the_same(column, value, streaming, tmp_path):
    path = jsonl(tmp_path / "chat.jsonl", [{column: value}, {column: value}])
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    for sample in load_calibration_data(config(path, dataset_streaming=streaming), tokenizer).samples:
        assert tokenizer.decode(sample) == RENDERED + tokenizer.eos_token


# What TRL trains on

USER, ASSISTANT = STANDARD


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("row", "expected"), [
    ({"prompt": [USER], "completion": [ASSISTANT]}, RENDERED),
    ({"prompt": "The quick", "completion": " fox."}, "The quick fox."),
    ({"prompt": "The quick", "completion": " fox.", "label": True}, "The quick fox."),
    ({"prompt": "", "completion": "The quick fox."}, "The quick fox."),
    ({"prompt": "The quick fox?", "response": "The lazy dog."}, RENDERED),
    ({"prompt": [USER], "response": [ASSISTANT]}, RENDERED),
    ({"instruction": "The quick fox?", "output": "The lazy dog."}, RENDERED),
], ids=str)  # fmt: skip
def test_two_columns_are_one_document(row, expected, streaming, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [row, row])
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    for sample in load_calibration_data(config(path, dataset_streaming=streaming), tokenizer).samples:
        assert tokenizer.decode(sample) == expected + tokenizer.eos_token


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "has columns prompt, chosen, rejected; name one of them that holds text"),
    ({"chosen": STANDARD, "rejected": STANDARD}, "has columns chosen, rejected; name one of them that holds text, or use mess"),
    ({"prompt": "The quick fox?"}, "has columns prompt; name one of them"),
    ({"prompt": [USER], "completion": "The lazy dog."}, "'completion' holds str; it takes lists of messages with 'role'"),
    ({"prompt": ["a"], "completion": ["b"]}, "'prompt' holds str; it takes lists of messages with 'role'"),
], ids=str)  # fmt: skip
def test_two_columns_that_cannot_be_read_are_refused(row, message, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [row, row])
    with pytest.raises(HeaprError, match=message) as error:
        load_calibration_data(config(path), tiny_tokenizer(chat_template=CHAT_TEMPLATE))
    assert "\n" not in str(error.value)


def test_messages_in_two_columns_need_a_chat_template_and_text_does_not(tmp_path):
    tokenizer = tiny_tokenizer()
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": [USER], "completion": [ASSISTANT]}] * 2)
    with pytest.raises(HeaprError, match="row .*holds messages but the tokenizer has no chat template; use text"):
        load_calibration_data(config(path), tokenizer)
    path = jsonl(tmp_path / "text.jsonl", [{"prompt": "The quick", "completion": " fox."}] * 2)
    for sample in load_calibration_data(config(path), tokenizer).samples:
        assert tokenizer.decode(sample) == "The quick fox." + tokenizer.eos_token


@pytest.mark.parametrize("beside", ["text", "messages"])
def test_a_column_of_dialogues_that_is_named_goes_before_others(beside, tmp_path):
    path = jsonl(tmp_path / "chat.jsonl", [{"conversations": SHAREGPT, beside: None}] * 2)
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    for sample in load_calibration_data(config(path, text_column="conversations"), tokenizer).samples:
        assert tokenizer.decode(sample) == RENDERED + tokenizer.eos_token


def test_tools_and_parts_of_a_message_reach_the_template():
    """Of a table all messages have the same keys; those that a message did not have are not given to the template."""
    template = "{% for m in messages %}{{ m['role'] }} {{ 'tool_calls' in m }};{% endfor %}"
    call = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": call}]
    rows = datasets.Dataset.from_dict({"messages": [messages]})
    tokenizer = tiny_tokenizer(chat_template=template)
    (sample,) = load_calibration_data(HeaprConfig(num_samples=1, seq_length=99), tokenizer, rows).samples
    assert tokenizer.decode(sample) == "user False;assistant True;" + tokenizer.eos_token


@pytest.mark.parametrize("row, expected", [
    ({"messages": [{"speaker": "human", "text": "Hello"}]}, "'messages' holds keys 'speaker', 'text'; it takes lists"),
    ({"messages": [{"role": "user", "content": 3}]}, "'messages' holds keys 'role', 'content'; it takes lists"),
    ({"messages": [*STANDARD, {"role": "user", "content": None}]}, "'messages' holds a message of 'user' without content"),
    ({"messages": [*STANDARD, {"content": "Hello"}]}, "'messages' holds keys .*'content'; it takes lists"),
    ({"messages": "prose"}, "'messages' holds str; it takes lists"),
    ({"conversations": [["human", "Hello"]]}, "'conversations' holds list; it takes lists"),
    ({"text": json.dumps(STANDARD)}, "'text' holds a dialogue as a JSON string"),
    ({"text": json.dumps({"messages": STANDARD})}, "'text' holds a dialogue as a JSON string"),
    ({"prompt": json.dumps(SHAREGPT), "response": "x"}, "'prompt' holds a dialogue as a JSON string"),
    ({"messages": [{"role": "system", "content": "Hello"}]}, r"refuses it \(Only user and assistant .* roles are system"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_read_is_refused_by_row_and_form(row, expected, streaming, tmp_path):
    path = jsonl(tmp_path / "chat.jsonl", [row])
    with pytest.raises(HeaprError, match=expected) as error:
        load_calibration_data(config(path, dataset_streaming=streaming), tiny_tokenizer(chat_template=STRICT))
    assert f"dataset={str(path)!r}: row 0" in str(error.value) or "row 0 of the stream" in str(error.value)
    assert "\n" not in str(error.value)


def test_json_that_is_no_dialogue_is_prose():
    tokenizer = tiny_tokenizer()
    rows = datasets.Dataset.from_dict({"text": ['[1, 2, {"a": 3}]', "{not json", '{"a": [{"role": "user"}]}']})
    assert len(load_calibration_data(HeaprConfig(num_samples=1, seq_length=9), tokenizer, rows).samples) == 1


def test_evaluation_mixtures_and_recovery_name_the_row_as_well(tmp_path):
    good, bad = {"messages": STANDARD}, {"messages": [{"role": "system", "content": "Hello"}, *STANDARD]}
    path = jsonl(tmp_path / "chat.jsonl", [good, good, good, bad])
    tokenizer = tiny_tokenizer(chat_template=STRICT)
    expected = f"dataset={str(path)!r}: row 3 .*the chat template refuses it"
    with pytest.raises(HeaprError, match=expected):
        evaluation_windows(tokenizer, path, 16)
    with pytest.raises(HeaprError, match=expected):
        load_calibration_data(config(path).replace(dataset=f"{path}:0.5,demo:0.5", num_samples=20), tokenizer)
    with pytest.raises(HeaprError, match=expected):  # documents were divided, and the row has its number in the file
        RecoveryData.load(RecoveryConfig(num_samples=20, seq_length=16, held_out=0.3), tokenizer, str(path))


@pytest.mark.parametrize("ids", [None, [[1, 2], [3]], [1.5], "1 2"], ids=repr)
def test_rows_that_are_no_token_ids_are_refused(ids, tmp_path):
    path = jsonl(tmp_path / "tokens.jsonl", [{"input_ids": ids}])
    for read in (lambda: load_calibration_data(config(path), None), lambda: evaluation_windows(None, path, 16)):
        with pytest.raises(HeaprError, match="row 0 .*input_ids=.*; each row is one list of token ids"):
            read()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix, head", [("jsonl", '{"text": "%s"}'), ("csv", "text\n%s"), ("txt", "%s")])
def test_another_encoding_is_the_cause_that_is_named(suffix, head, streaming, tmp_path):
    path = tmp_path / f"latin.{suffix}"
    path.write_bytes((head % "café naïve" + "\n").encode("latin-1"))
    with pytest.raises(HeaprError, match=r"cannot be loaded \(it is not UTF-8 text\); save it as UTF-8"):
        load_calibration_data(config(path, dataset_streaming=streaming), tiny_tokenizer())


def test_the_cause_is_named_and_not_that_something_happened(tmp_path, monkeypatch):
    """Nulls for longer than `datasets` looks ahead, then text."""
    path = tmp_path / "nulls.jsonl"
    rows = f'{{"text": null, "other": "{"." * 1000}"}}\n' * 10_500  # more than 10 MiB, in few rows
    path.write_text(rows + '{"text": "hello", "other": ""}\n')
    for streaming in (False, True):
        with pytest.raises(HeaprError, match=r"cannot be loaded \(Couldn't cast array of type string to null"):
            load_calibration_data(config(path, dataset_streaming=streaming), tiny_tokenizer())
