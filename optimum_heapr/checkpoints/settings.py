# Licensed under the Apache License, Version 2.0
"""Refuses a folder whose JSON files are damaged: transformers goes on without some, and ends in the middle of others."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from ..utils.errors import HeaprError, reason_of


INDEX = "model.safetensors.index.json"
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "adapter_config.json",
    INDEX,
)


def check_settings(folder: str) -> None:
    """Refuses a model one of whose JSON files does not hold a mapping, or whose index does not name its files.

    Raises:
        HeaprError: naming the file and what is the matter with it.
    """
    for path in (Path(folder, name) for name in _SETTINGS):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("it holds no mapping")
            if path.name == INDEX and not _names_files(content.get("weight_map")):
                raise ValueError("its weight_map does not name a file beside it for each tensor")
        except (OSError, ValueError, RecursionError) as error:
            raise HeaprError(
                f"model={folder!r}: {path.name} cannot be read ({reason_of(error)}); copy the model again"
            ) from error


def _names_files(weight_map: Any) -> bool:
    files = weight_map.values() if isinstance(weight_map, dict) else [None]
    return all(isinstance(file, str) and PurePosixPath(file).name == file for file in files)
