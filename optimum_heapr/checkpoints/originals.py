# Licensed under the Apache License, Version 2.0
"""What a pruned checkpoint has of the unpruned one besides weights: its files as they are, and the keys of its configuration.

Engines and tokenizers of other versions read what their own version wrote, and take defaults without a word for what they do
not find. So the files of the tokenizer, of processors and of generation stay as they are to the byte, and the configuration of
a stock layout has the keys of the original, and besides only what pruning changed.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.files import write_json
from ..utils.logging import get_logger


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..hub.base_model import BaseModel


logger = get_logger(__name__)

_LEFT_OUT = (
    "auto_map",
    "quantization_config",
    "transformers_version",
    "_name_or_path",
)  # what is not true of the result, or nobody's business


def carry_over(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, base: BaseModel, is_stock: bool
) -> None:
    """Makes of what `save_pretrained` wrote what the unpruned checkpoint has, as far as that is still true.

    Args:
        folder (`Path`): of the pruned model, with its weights and `config.json`.
        model (`PreTrainedModel`): the pruned model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): is written anew if it is not the one of the checkpoint.
        base (`BaseModel`): says where that is.
        is_stock (`bool`): whether the result has the original architecture.
    """
    written = _generation(folder)
    for name, path in base.files.items():
        if name == "config.json":
            continue
        if not path.is_file():
            logger.warning(
                f"{base.name}: {name} was there when the model was loaded and has gone; it is not carried over"
            )
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    if written is not None and _generation(folder) != written:  # it was changed since
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None and not _is_tokenizer_of(folder, tokenizer):
        tokenizer.save_pretrained(folder)
    if is_stock and "config.json" in base.files and base.files["config.json"].is_file():
        original = json.loads(base.files["config.json"].read_text(encoding="utf-8"))
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        before = type(model.config).from_dict(copy.deepcopy(original)).to_dict()  # it takes parts of what it is given
        write_json(folder / "config.json", with_original_keys(saved, original, model.config, before))


def with_original_keys(
    saved: dict[str, Any], original: dict[str, Any], config: PreTrainedConfig, before: dict[str, Any]
) -> dict[str, Any]:
    """The configuration of a pruned model in the original's keys.

    Args:
        saved (`dict`): as transformers writes it.
        original (`dict`): of the unpruned model, as its checkpoint has it.
        config (`PreTrainedConfig`): of the pruned model.
        before (`dict`): all values of the unpruned model's configuration, under the names of this transformers.

    Returns:
        `dict`: for each key of the original what it means now: where pruning changed the value, the new one, else the original
        one as it was written, for versions have names of their own for values, too. Of other keys of `saved` those that pruning
        changed: what the original leaves to a default, another version may read otherwise.
    """
    now = config.to_dict()
    merged = {
        key: value
        for key, value in saved.items()
        if key in original or key not in now or key not in before or now[key] != before[key]
    }
    for key, value in original.items():
        if key in _LEFT_OUT:
            continue
        name = {"torch_dtype": "dtype", **config.attribute_map}.get(key, key)
        part = getattr(config, key, None)
        if isinstance(value, dict) and hasattr(part, "to_dict") and isinstance(before.get(key), dict):
            merged[key] = with_original_keys(saved.get(key, {}), value, part, before[key])
        elif name not in now or _means(now[name]) == _means(before.get(name)):
            merged[key] = value
        elif key not in saved:
            merged[key] = now[name]
    return dict(sorted(merged.items()))


def _means(value: Any) -> Any:
    """A value to compare: engines know a class as the original spells it, `PhiMoEForCausalLM` where transformers has `Phimoe…`."""
    names = isinstance(value, list) and all(isinstance(name, str) and name.endswith("ForCausalLM") for name in value)
    return [name.lower() for name in value] if names else value


def _generation(folder: Path) -> dict[str, Any] | None:
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    values = GenerationConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in values.items() if key not in ("transformers_version", "_from_model_config")}


def _is_tokenizer_of(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether loading the tokenizer of a folder gives this one."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        return False
    try:
        there = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):  # of code of its own
        return True
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        there.save_pretrained(first)
        tokenizer.save_pretrained(second)
        return _content(Path(first)) == _content(Path(second))


def _content(folder: Path) -> dict[str, Any]:
    content = {}
    for path in folder.rglob("*.*"):
        content[path.name] = path.read_bytes()
        if path.name == "tokenizer_config.json":  # where it was read from is none of its properties
            values = json.loads(content[path.name])
            content[path.name] = {key: value for key, value in values.items() if key != "name_or_path"}
    return content
