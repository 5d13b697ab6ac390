# Licensed under the Apache License, Version 2.0
"""From rows of a data set to documents: texts or dialogues, as token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..utils.errors import HeaprError
from .sources import rows_of


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase


# Columns that hold dialogues, and pairs of columns that hold the two sides of one with one turn.
_DIALOGUES = ("messages", "conversations", "conversation")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))

# What ShareGPT, whose messages have `from` and `value`, calls the roles of chat templates.
_ROLES = {"human": "user", "gpt": "assistant"}


def columns_of(rows: Dataset | IterableDataset, source: str) -> list[str]:
    """Names of the columns; of a stream that does not tell they are those of its first row, and none if it has no row."""
    known = rows.column_names
    return list(next(rows_of(rows, source), {})) if known is None else known


def usable_columns(rows: Dataset | IterableDataset, source: str, text_column: str) -> list[str]:
    """As [`columns_of`], of rows that have something to calibrate or evaluate on.

    Raises:
        HeaprError: if there are no rows, or no column of tokens, messages or text.
    """
    columns = columns_of(rows, source)
    if not columns or hasattr(rows, "__len__") and len(rows) == 0:
        raise HeaprError(f"dataset={source!r}: is empty; name one with text in it")
    if "input_ids" not in columns:
        _reader_of(columns, source, text_column)
    return columns


def token_rows(rows: Dataset | IterableDataset, source: str) -> Iterator[torch.Tensor]:
    """The rows of the column `input_ids`, as they are: 1-d, int64.

    Raises:
        HeaprError: if one is no list of whole numbers.
    """
    for index, row in enumerate(rows_of(rows, source)):
        ids = row["input_ids"]
        if not isinstance(ids, list) or any(type(token) is not int for token in ids):
            found = "null" if ids is None else f"{str(ids)[:60]}"
            raise HeaprError(
                f"dataset={source!r}: row {index} (from 0): input_ids={found}; each row is one list of token ids"
            )
        yield torch.tensor(ids, dtype=torch.int64)


def tokenized_documents(
    rows: Dataset | IterableDataset,
    order: Iterable[int] | None,
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    text_column: str,
) -> Iterator[list[int]]:
    """Token ids of one document after another, each closed by the end-of-text token if the tokenizer has one.

    A document is a row's dialogue, rendered by the chat template, or its text. Dialogues are `messages` or `conversations`,
    with `role` and `content` or, as in ShareGPT, `from` and `value`, or one turn in two columns (`prompt` and `response`,
    `instruction` and `output`). `prompt` and `completion` are what they are to TRL: messages, or text that goes on. The rows are those of `order`, or, of a stream, all as they come.

    Raises:
        HeaprError: if there is no tokenizer, no such column, no chat template for dialogues, or a row that cannot be read or
            that the chat template refuses.
    """
    if tokenizer is None:
        raise HeaprError(f"dataset={source!r}: holds text but the model has no tokenizer; pass one, or input_ids")
    columns = columns_of(rows, source)
    if _dialogue_column(columns, text_column) and tokenizer.chat_template is None:
        raise HeaprError(f"dataset={source!r}: holds messages but the tokenizer has no chat template; use text")
    read = _reader_of(columns, source, text_column)
    order = None if order is None else list(order)
    for place, row in enumerate(rows_of(rows, source, order)):
        try:
            document = read(row)
            if not isinstance(document, str) and tokenizer.chat_template is None and _holds_messages(row):
                raise _UnreadableError("holds messages but the tokenizer has no chat template; use text")
            ids = _encoded(document, tokenizer) if document else []
        except _UnreadableError as error:
            where = f"row {place} of the stream" if order is None else f"row {_number_of(rows, order[place])}"
            raise HeaprError(f"dataset={source!r}: {where} (from 0): {error}") from error
        if ids:
            yield ids + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])


class _UnreadableError(Exception):
    """What is wrong with a row, and what to do; the caller knows which it is."""


def _number_of(rows: Dataset, index: int) -> int:
    """The number of a row in its file, also if `rows` is a selection."""
    chosen = getattr(rows, "_indices", None)
    return index if chosen is None else chosen.column(0)[index].as_py()


def _dialogue_column(columns: list[str], text_column: str) -> str | None:
    """The column of dialogues: the one that is asked for; else `messages` before text, others where there is no text."""
    if text_column in _DIALOGUES and text_column in columns:
        return text_column
    names = _DIALOGUES if text_column not in columns else _DIALOGUES[:1]
    return next((name for name in names if name in columns), None)


def _reader_of(
    columns: list[str], source: str, text_column: str
) -> Callable[[dict[str, Any]], str | list[dict[str, Any]]]:
    """What takes a text or messages out of a row, by the columns there are; both are empty where a row holds nothing."""
    if dialogue := _dialogue_column(columns, text_column):
        return lambda row: _messages(row.get(dialogue), dialogue)
    pair = next((pair for pair in _PAIRS if set(pair) <= set(columns)), None)
    if pair is not None and text_column not in columns:

        def turn(row: dict[str, Any]) -> str | list[dict[str, Any]]:
            if _holds_messages(row):
                return [message for column in pair for message in _messages(row.get(column), column)]
            prompt, response = (_text(row, column) for column in pair)
            if pair[1] == "completion":
                return prompt + response
            if pair[0] == "instruction" and "input" in columns and (context := _text(row, "input")):
                prompt = f"{prompt}\n{context}"
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return messages if prompt or response else []

        return turn
    if text_column not in columns:
        pairs = ", ".join(" and ".join(pair) for pair in _PAIRS)
        raise HeaprError(
            f"text_column={text_column!r}: {source!r} has columns {', '.join(columns)}; name one of them that holds text, or "
            f"use {', '.join(_DIALOGUES[:2])}, {pairs}"
        )
    return lambda row: _text(row, text_column)


def _holds_messages(row: dict[str, Any]) -> bool:
    """Whether a row with the two sides of a dialogue in two columns holds them as messages."""
    return any(isinstance(row.get(column), list) for pair in _PAIRS for column in pair)


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column) or ""
    if not isinstance(value, str):
        raise _UnreadableError(f"{column!r} holds {type(value).__name__}, not text; name another column")
    if _is_dialogue(parsed := _parsed(value)) or isinstance(parsed, dict) and any(map(parsed.get, _DIALOGUES)):
        raise _UnreadableError(
            f"{column!r} holds a dialogue as a JSON string, which would be read as prose; put it into 'messages'"
        )
    return value


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, as chat templates take them, from those, from ShareGPT's, or from JSON of either."""
    messages = _parsed(value) if isinstance(value, str) else value
    if not value:
        return []
    if not _is_dialogue(messages):
        wrong = next(entry for entry in messages if not _is_message(entry)) if isinstance(messages, list) else value
        found = f"keys {', '.join(map(repr, wrong))}" if isinstance(wrong, dict) else type(wrong).__name__
        if isinstance(wrong, dict) and isinstance(wrong.get("role"), str) and wrong.get("content", "") is None:
            found = f"a message of {wrong['role']!r} without content"
        raise _UnreadableError(
            f"{column!r} holds {found}; it takes lists of messages with 'role' and 'content', or 'from' and 'value'"
        )
    return [_message(message) for message in messages]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    if message.get("role") is None:
        return {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}
    # The columns of a table are those of all its messages: what this one does not have is null.
    return {name: value for name, value in message.items() if value is not None or name == "content"}


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    said = isinstance(value.get("content"), (str, list)) or bool(value.get("tool_calls"))
    return isinstance(value.get("role"), str) and said or all(isinstance(value.get(k), str) for k in ("from", "value"))


def _parsed(text: str) -> Any:
    """The list or mapping that a string is JSON of, or `None`."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _encoded(document: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not isinstance(document, str) and tokenizer.chat_template is not None:
        from jinja2 import TemplateError

        try:
            return tokenizer.apply_chat_template(document, return_dict=False)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            roles = ", ".join(str(message["role"]) for message in document[:6])
            raise _UnreadableError(
                f"the chat template refuses it ({reason}); its roles are {roles}: change it or leave it out"
            ) from error
    if not isinstance(document, str):
        document = "\n".join(message["content"] for message in document)
    # The length warning of the tokenizer is about feeding a document whole; documents are cut later.
    return tokenizer(document, verbose=False)["input_ids"]
