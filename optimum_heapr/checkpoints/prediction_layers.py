# Licensed under the Apache License, Version 2.0
"""Layers for multi-token prediction, which no class of transformers' models holds: left out, and no longer announced."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from transformers.conversion_mapping import get_model_conversion_mapping

from ..layerwise.source import parameters_of


if TYPE_CHECKING:
    from transformers import PreTrainedModel


_FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""What configurations call the number of these layers."""

_MODULE, _LAYER = re.compile(r"^(.*\.)?mtp\."), re.compile(r"^(?:.*\.)?layers\.(\d+)\.")


def leave_out(model: PreTrainedModel, stored: Iterable[str]) -> str | None:
    """Sets the number of prediction layers in a model's configuration to 0 if its checkpoint has some: they are not loaded.

    Their experts would keep the old width, which one configuration cannot say beside the new one.

    Args:
        model (`PreTrainedModel`): with or without storage; its configuration is changed.
        stored (`Iterable[str]`): names of the tensors of its checkpoint.

    Returns:
        `str`, *optional*: what was left out, for people to read; `None` if nothing was.
    """
    stored, config = list(stored), model.config.get_text_config()
    _, used = parameters_of(model, stored, get_model_conversion_mapping(model))
    loaded = {name for patterns in used.values() for names in patterns.values() for name in names}
    prefixes = [prefix_of(name, config.num_hidden_layers) for name in stored if name not in loaded]
    prefixes = [prefix for prefix in prefixes if prefix]
    if not prefixes:
        return None
    changed = []
    for part in {id(part): part for part in (model.config, config)}.values():
        for field in _FIELDS:
            if field not in part.attribute_map and getattr(part, field, None):
                setattr(part, field, 0)
                changed.append(field)
    fields = f"; {', '.join(dict.fromkeys(changed))} is 0 now" if changed else ""
    return (
        f"{len(prefixes)} tensors of layers for multi-token prediction ({', '.join(sorted(set(prefixes)))}) are not "
        f"carried over{fields}"
    )


def prefix_of(name: str, layers: int) -> str | None:
    """The beginning of a tensor's name that says it is of a prediction layer of a model of so many layers, if it does."""
    if found := _MODULE.match(name):
        return f"{found[0]}*"
    found = _LAYER.match(name)
    return f"{found[0]}*" if found and int(found[1]) >= layers else None
