# Licensed under the Apache License, Version 2.0
"""A model from its configuration alone: no weights on the disk, no download of them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch

from ..utils.errors import HeaprError, reason_of
from ..utils.placement import without_storage
from .origins import not_installed, place_of


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_outline(name: str | os.PathLike, dtype: str = "auto", **hub_options: Any) -> PreTrainedModel:
    """The model that a configuration describes, without storage.

    Args:
        name (`str`): a folder with a `config.json`, the name of a repository on the Hub, or `demo`.
        dtype (`str`): of the weights; `auto` is what the configuration says, and float32 where it says nothing.
        hub_options: `revision`, `token`, `cache_dir`, `subfolder`, `trust_remote_code`.

    Raises:
        HeaprError: if there is no such configuration, or transformers does not know its type.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from ..modeling.modeling_heapr import auto_class_name

    path = place_of(name)
    trust = {key: hub_options[key] for key in ("trust_remote_code",) if key in hub_options}
    try:
        config = AutoConfig.from_pretrained(path, **hub_options)
        chosen = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        auto_class = getattr(transformers, auto_class_name(type(config)))
        return without_storage(lambda: auto_class.from_config(config, dtype=chosen, **trust))
    except ImportError as error:
        raise not_installed(name, error) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise HeaprError(
            f"model={str(name)!r}: its configuration cannot be read ({reason_of(error)}); name a folder with a config.json, or a "
            "repository on the Hub"
        ) from error


def stored_bytes(name: str | os.PathLike, **hub_options: Any) -> int | None:
    """Bytes of the weights as the checkpoint stores them, from its index; `None` where there is no index, as of one file.

    Args:
        name, hub_options: as for [`load_outline`].
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

    path = place_of(name)
    options = {key: value for key, value in hub_options.items() if key != "trust_remote_code"}
    try:
        index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **options)
        if index is None:
            return None
        with open(index, encoding="utf-8") as file:
            size = json.load(file)["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return int(size) if isinstance(size, int | float) else None
