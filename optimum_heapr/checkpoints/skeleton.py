# Licensed under the Apache License, Version 2.0
"""A model without storage, as loading its checkpoint would give it: dtypes, conversions, generation config and all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging

from ..layerwise.source import parameters_of
from ..utils.placement import without_storage
from ..utils.quantized import is_dequantizing
from ..utils.tensor_files import TensorReader, checkpoint_files
from .completeness import load_complete
from .origins import hub_options_in


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..utils.tensor_files import TensorInfo


def load_skeleton(auto_class: type, config: PreTrainedConfig, path: str, name: str, **options: Any) -> PreTrainedModel:
    """The model that `auto_class.from_pretrained(path)` gives, without storage; only headers of its files are read.

    Args:
        auto_class (`type`): auto class of the model.
        config (`PreTrainedConfig`): its configuration.
        path (`str`): a folder, or the name of a repository on the Hub.
        name (`str`): what the user called it.
        options: as for `from_pretrained`.

    Raises:
        HeaprError: if its weights are not safetensors, or some are missing.
    """
    empty, reader = _empty_model(auto_class, config, path, **options)
    tensors = reader.tensors
    hub_options = hub_options_in(options)
    stored = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in tensors.items()}
    others = {key: value for key, value in options.items() if key not in (*hub_options, "trust_remote_code")}
    options = {**others, "config": config, "state_dict": stored, "device_map": "meta"}
    with _without_bar():
        model = load_complete(name, partial(type(empty).from_pretrained, None, **options), lambda: (empty, tensors))
    # transformers 5.24 leaves them out of what it loads dequantized, which is not saved as it was stored.
    model._weight_conversions = empty._weight_conversions
    _tie_duplicates(model, reader)
    model.config.name_or_path = path
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path, **hub_options)
        except OSError:  # then it is made from the configuration, as transformers does
            made = {"config_file_name": "config.json", "_from_model_config": True}
            model.generation_config = GenerationConfig.from_pretrained(path, **made, **hub_options)
    return model


@contextmanager
def _without_bar() -> Iterator[None]:
    """No bar says that weights are loaded, for none are."""
    shown = logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def empty_model(
    auto_class: type, config: PreTrainedConfig, path: str, **options: Any
) -> tuple[PreTrainedModel, dict[str, TensorInfo]]:
    """A model without storage, just made, and what its safetensors hold, by name; arguments as of [`load_skeleton`].

    Its `_weight_conversions` are those that loading it would use.

    Raises:
        HeaprError: if its weights are not safetensors.
    """
    model, reader = _empty_model(auto_class, config, path, **options)
    return model, reader.tensors


def _empty_model(
    auto_class: type, config: PreTrainedConfig, path: str, **options: Any
) -> tuple[PreTrainedModel, TensorReader]:
    reader = TensorReader(checkpoint_files(path, **hub_options_in(options)))
    trust = {"trust_remote_code": options["trust_remote_code"]} if "trust_remote_code" in options else {}
    model, quantizer = without_storage(lambda: auto_class.from_config(config, **trust)), None
    if is_dequantizing(config):
        quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
        quantizer.validate_environment()
    model._weight_conversions = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    return model, reader


def _tie_duplicates(model: PreTrainedModel, reader: TensorReader) -> None:
    """Ties weights that the checkpoint stores twice if they are equal, as loading does, which cannot compare what has no storage."""
    _, stored = parameters_of(model, reader.tensors, getattr(model, "_weight_conversions", None) or [])
    for target, origin in list(model.all_tied_weights_keys.items()):
        first, second = model.get_parameter_or_buffer(target), model.get_parameter_or_buffer(origin)
        if first is second or target not in stored or origin not in stored:
            continue
        # A weight, and scales where it is quantized.
        one, other = (sorted(sum(stored[name].values(), [])) for name in (target, origin))
        if first.shape == second.shape and _same(reader, one, other, first.dtype):
            path, _, name = target.rpartition(".")
            setattr(model.get_submodule(path), name, second)
        else:
            del model.all_tied_weights_keys[target]


def _same(reader: TensorReader, one: list[str], other: list[str], dtype: torch.dtype) -> bool:
    pairs = ((reader.read(first).to(dtype), reader.read(second).to(dtype)) for first, second in zip(one, other))
    return len(one) == len(other) and all(torch.equal(*pair) for pair in pairs)
