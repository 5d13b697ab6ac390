# Licensed under the Apache License, Version 2.0
"""From rows of a data set to documents: texts or dialogues, as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..utils.errors import HeaprError
from .sources import rows_of


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase


_PAIRS = (("prompt", "response"), ("instruction", "output"))


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


def tokenized_documents(
    rows: Dataset | IterableDataset,
    order: Iterable[int] | None,
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    text_column: str,
) -> Iterator[list[int]]:
    """Token ids of one document after another, each closed by the end-of-text token if the tokenizer has one.

    A document is a row's `messages` or dialogue of one turn (`prompt` and `response`, `instruction` and `output`),
    rendered by the chat template, or its text. The rows are those of `order`, or, of a stream, all as they come.

    Raises:
        HeaprError: if there is no tokenizer, no such column, or no chat template for messages.
    """
    if tokenizer is None:
        raise HeaprError(f"dataset={source!r}: holds text but the model has no tokenizer; pass one, or input_ids")
    columns = columns_of(rows, source)
    if "messages" in columns and tokenizer.chat_template is None:
        raise HeaprError(f"dataset={source!r}: holds messages but the tokenizer has no chat template; use text")
    read = _reader_of(columns, source, text_column)
    for row in rows_of(rows, source) if order is None else map(rows.__getitem__, order):
        document = read(row)
        if document:
            yield _encoded(document, tokenizer) + (
                [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
            )


def _reader_of(columns: list[str], source: str, text_column: str) -> Any:
    """What takes a text or messages out of a row, by the columns there are; both are empty where a row holds nothing."""
    if "messages" in columns:
        return lambda row: row.get("messages")

    def text_of(row: dict[str, Any], column: str) -> str:
        if not isinstance(value := row.get(column) or "", str):
            raise HeaprError(
                f"dataset={source!r}: {column!r} holds {type(value).__name__}, not text; name another column"
            )
        return value

    pair = next((pair for pair in _PAIRS if set(pair) <= set(columns)), None)
    if pair is not None and text_column not in columns:

        def turn(row: dict[str, Any]) -> list[dict[str, str]]:
            prompt, response = (text_of(row, column) for column in pair)
            if pair[0] == "instruction" and "input" in columns and (context := text_of(row, "input")):
                prompt = f"{prompt}\n{context}"
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return messages if prompt or response else []

        return turn
    if text_column not in columns:
        raise HeaprError(f"text_column={text_column!r}: {source!r} has columns {', '.join(columns)}; name one of them")
    return lambda row: text_of(row, text_column)


def _encoded(document: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not isinstance(document, str) and tokenizer.chat_template is not None:
        return tokenizer.apply_chat_template(document, return_dict=False)
    if not isinstance(document, str):
        document = "\n".join(message["content"] for message in document)
    # The length warning of the tokenizer is about feeding a document whole; documents are cut later.
    return tokenizer(document, verbose=False)["input_ids"]
