# Licensed under the Apache License, Version 2.0
"""Where a model is: what its name stands for, and whether there is one at all, before it is loaded."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from ..demo import DEMO_MODEL, demo_model_path
from ..utils.errors import HeaprError, reason_of
from .settings import check_settings


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def hub_options_in(model_options: dict[str, Any]) -> dict[str, Any]:
    """Those options of `from_pretrained` that say where on the Hub something is."""
    names = ("revision", "token", "cache_dir", "subfolder")
    return {name: model_options[name] for name in names if name in model_options}


def place_of(name: str | os.PathLike) -> str:
    """The folder of a model, from the root, or its name on the Hub.

    Raises:
        HeaprError: if it can be neither, or the folder's settings are damaged.
    """
    path = str(demo_model_path()) if str(name) == DEMO_MODEL else str(name)
    if not os.path.isdir(path) and (path.startswith((".", "~", "/")) or path.count("/") > 1):
        raise HeaprError(
            f"model={path!r}: no such folder, and no name on the Hub either; name a folder or a repository on the Hub that "
            "holds a causal language model"
        )
    if not os.path.isdir(path):
        return path
    check_settings(path)
    return os.path.abspath(path)  # the working folder may change before it is cut


def base_of_adapter(path: str, hub_options: dict[str, Any]) -> str | None:
    """The model that an adapter in PEFT's format belongs to, or `None` for a model.

    Adapters of recovery hold the name of its folder alone, which is looked for here and beside the adapter.
    """
    from transformers.utils import find_adapter_config_file

    options = {name: value for name, value in hub_options.items() if name in ("revision", "token", "cache_dir")}
    found = find_adapter_config_file(path, **options)
    if found is None:
        return None
    with open(found, encoding="utf-8") as file:
        base = json.load(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise HeaprError(
            f"model={path!r}: is an adapter of a model that was in memory, and does not say where that is; load that model, "
            "then the adapter with optimum_heapr.recovery.adapter.load_adapter"
        )
    beside = os.path.join(os.path.dirname(os.path.abspath(path)), base)
    if os.path.isdir(path) and not os.path.isdir(base) and os.path.isdir(beside):
        return beside
    if not os.path.isdir(base) and "/" not in base:  # no name on the Hub either
        raise HeaprError(
            f"model={path!r}: is an adapter of {base!r}, and no such folder is here or beside it; put it there, or run this "
            "where it is"
        )
    return base


def not_installed(name: str | os.PathLike, error: ImportError) -> HeaprError:
    """What is said where a model, its code or its weights need a package that is not here."""
    return HeaprError(
        f"model={str(name)!r}: cannot be loaded ({reason_of(error)}); install what that names, or go where it is"
    )


def load_configuration(name: str | os.PathLike, **model_options: Any) -> PreTrainedConfig:
    """The configuration of a model, of an adapter that of its base model: what tells whether there is one at all.

    Raises:
        HeaprError: if there is no such model, or its type is unknown.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path, hub_options = place_of(name), hub_options_in(model_options)
    if "trust_remote_code" in model_options:
        hub_options["trust_remote_code"] = model_options["trust_remote_code"]
    try:
        return AutoConfig.from_pretrained(base_of_adapter(path, hub_options) or path, **hub_options)
    except ImportError as error:
        raise not_installed(name, error) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise HeaprError(
            f"model={str(name)!r}: cannot be loaded ({reason_of(error)}); name a folder or a repository on the Hub that holds a "
            "causal language model"
        ) from error
