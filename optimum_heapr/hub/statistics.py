# Licensed under the Apache License, Version 2.0
"""Statistics that were measured before: of a file, a folder or a repository, or beside the model that is loaded."""

from __future__ import annotations

import os
import re
from typing import Any

from ..calibration.statistics import AtomicStatistics
from ..demo import DEMO_MODEL
from ..utils.companions import CARD_NAME, STATISTICS_NAME, find_file, find_own, own_file
from ..utils.errors import HeaprError
from ..utils.logging import get_logger


logger = get_logger(__name__)

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load_statistics(
    statistics: AtomicStatistics | str | os.PathLike | None, hub_options: dict[str, Any] | None = None
) -> AtomicStatistics | None:
    """Reads statistics from wherever they are.

    Args:
        statistics (`AtomicStatistics` or `str`, *optional*): a file; a folder or the name of a repository on the Hub that
            holds `statistics.safetensors`, such as that of a pruned model; statistics and `None` are returned as they are.
        hub_options (`dict`, *optional*): `token` and `cache_dir` for a repository.

    Raises:
        HeaprError: if there are none, or they cannot be read.
    """
    if statistics is None or isinstance(statistics, AtomicStatistics):
        return statistics
    place = os.fspath(statistics)
    if os.path.isdir(place):
        return AtomicStatistics.load(own_file(place, STATISTICS_NAME))
    if os.path.exists(place) or place.endswith(".safetensors") or not _REPOSITORY.fullmatch(place):
        return AtomicStatistics.load(place)
    options = {name: value for name, value in (hub_options or {}).items() if name in ("token", "cache_dir")}
    path, reason = find_own(place, STATISTICS_NAME, **options)
    if path is None:
        raise HeaprError(
            f"statistics={place!r}: {reason or f'is no file, and the repository has no {STATISTICS_NAME}'}; name a file, "
            f"or a folder or repository with {STATISTICS_NAME}"
        )
    return AtomicStatistics.load(path)


def measured_before(model: str | os.PathLike, hub_options: dict[str, Any]) -> tuple[str, AtomicStatistics | None]:
    """The statistics beside a model, if there are any, and the model that they are of.

    That is the model itself or, where it was pruned already, the one that its card names as its base model: a pruned model
    cannot be pruned again, but what was measured before serves for every other ratio.

    Args:
        model (`str`): a folder or the name of a repository on the Hub, pruned or not.
        hub_options (`dict`): `revision`, `token`, `cache_dir`, `subfolder` that the model is loaded with.

    Raises:
        HeaprError: if the statistics cannot be read.
    """
    from transformers import PreTrainedConfig

    name = os.fspath(model)
    if name == DEMO_MODEL:
        return name, None
    path, _ = find_own(name, STATISTICS_NAME, **hub_options)
    if path is None:
        return name, None
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **hub_options)
    except (OSError, ValueError):  # loading the model says what is wrong with it
        return name, None
    statistics = AtomicStatistics.load(path)
    if config.get("heapr_config") is None:
        return name, statistics
    base = _base_model(name, hub_options)
    if base is None:  # what was measured is of a model that nobody knows
        return name, None
    logger.warning(
        f"{name} was pruned already: loading its base model {base}, and the statistics that {name} holds of it"
    )
    return base, statistics


def _base_model(name: str, hub_options: dict[str, Any]) -> str | None:
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    path, _ = find_file(name, CARD_NAME, **hub_options)
    try:
        base = (metadata_load(path) or {}).get("base_model") if path else None
    except (OSError, ValueError, AttributeError, YAMLError):
        return None
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) and _REPOSITORY.fullmatch(base) else None
