# Licensed under the Apache License, Version 2.0
"""The model that was pruned: its name, the commit that was loaded, and what its own card says of licence and language."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..demo import DEMO_MODEL, demo_model_path
from ..utils.companions import CARD_NAME
from .original_files import files_of_folder, files_of_repository


if TYPE_CHECKING:
    from transformers import PreTrainedModel


_CARRIED_OVER = ("license", "license_name", "license_link", "language")


@dataclass
class BaseModel:
    """
    The model that was pruned.

    Attributes:
        name (`str`): its name on the Hub, or that of its folder, or its class.
        on_hub (`bool`): whether that is a name on the Hub.
        commit (`str`, *optional*): the commit there that was loaded, if that is known.
        metadata (`dict`): of its own card: licence and language.
        files (`dict[str, Path]`): by name, those of its files that the pruned model has as well, and `config.json`.
    """

    name: str
    on_hub: bool = False
    commit: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel, hub_options: dict[str, Any] | None = None) -> BaseModel:
        """Finds out where a model was loaded from, and reads the card there if there is one.

        Args:
            model (`PreTrainedModel`): any model; only its configuration is looked at.
            hub_options (`dict`, *optional*): `revision`, `token`, `cache_dir`, `subfolder` as it was loaded with, if known.
        """
        source = getattr(model.config, "_name_or_path", "")
        if source == str(demo_model_path()):
            return cls(DEMO_MODEL, files=files_of_folder(Path(source)))
        if source and Path(source).is_dir():
            files = files_of_folder(Path(source) / ((hub_options or {}).get("subfolder") or ""))
            return cls(Path(source).resolve().name, metadata=_carried_over(Path(source) / CARD_NAME), files=files)
        config = _cached_config(source, hub_options or {})
        if config is None:  # made in code, or its folder has gone
            return cls(type(model).__name__.removeprefix("Heapr"))
        commit = config.parents[len(Path((hub_options or {}).get("subfolder") or "").parts)].name
        files = files_of_repository(source, commit, config, hub_options or {})
        card = _download_card(source, commit, hub_options or {})
        # Without the options it may have been another revision that was loaded.
        base = cls(source, True, None if hub_options is None else commit, _carried_over(card), files)
        link = base.metadata.get("license_link")
        if link and "://" not in link:  # relative to the base model's repository
            base.metadata["license_link"] = f"https://huggingface.co/{source}/blob/main/{link}"
        return base


def _carried_over(card: Path | None) -> dict[str, Any]:
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    if card is None or not card.is_file():
        return {}
    try:
        metadata = metadata_load(card) or {}
    except (OSError, ValueError, TypeError, AttributeError, YAMLError):  # a card that nobody can read says nothing
        return {}
    return {key: metadata[key] for key in _CARRIED_OVER if metadata.get(key)}


def _cached_config(name: str, hub_options: dict[str, Any]) -> Path | None:
    """The configuration of a repository, which is in the cache for every model that was loaded, in a folder named by its commit."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder, options = hub_options.get("subfolder") or "", _given(hub_options, "revision", "cache_dir")
    try:
        path = try_to_load_from_cache(name, (Path(folder) / "config.json").as_posix(), **options)
    except HFValidationError:  # a path, or nothing
        return None
    return Path(path) if isinstance(path, str) else None


def _given(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if options.get(name) is not None}


def _download_card(name: str, commit: str, hub_options: dict[str, Any]) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    try:
        return Path(hf_hub_download(name, CARD_NAME, revision=commit, **_given(hub_options, "token", "cache_dir")))
    except (EntryNotFoundError, HTTPError, OSError):  # no card, or no network for a model in the cache
        return None
