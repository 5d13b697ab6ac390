# Licensed under the Apache License, Version 2.0
"""What stands in the folder of a checkpoint besides the model, and where.

The root is an interface: other software takes every `*.safetensors` there for weights. So it holds the model and its card, and
what is ours lives in a folder of its own, `heapr/`. Checkpoints that have it in the root, as the first version wrote them, are
read all the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import HeaprError, reason_of


FOLDER = "heapr"

CARD_NAME = "README.md"  # in the root: it is what the Hub shows

CONFIG_NAME = "heapr_config.json"
PLAN_NAME = "plan.safetensors"
STATISTICS_NAME = "statistics.safetensors"
REPORT_NAME = "report.json"
REPORT_TEXT_NAME = "report.md"
REPORT_PAGE_NAME = "report.html"
CHART_NAME = "kept_widths.svg"
RECOVERY_NAME = "recovery_report.json"

OWN_NAMES = (
    CONFIG_NAME,
    PLAN_NAME,
    STATISTICS_NAME,
    REPORT_NAME,
    REPORT_TEXT_NAME,
    REPORT_PAGE_NAME,
    CHART_NAME,
    RECOVERY_NAME,
)


def own_folder(checkpoint: str | os.PathLike) -> Path:
    """The folder in the folder of a checkpoint that what is ours is written to; it is made."""
    folder = Path(checkpoint) / FOLDER
    folder.mkdir(exist_ok=True)
    return folder


def own_file(checkpoint: str | os.PathLike, name: str) -> Path:
    """Where in the folder of a checkpoint one of our files is, or would be if there were one."""
    new, old = Path(checkpoint) / FOLDER / name, Path(checkpoint) / name
    return old if old.is_file() and not new.is_file() else new


def find_own(checkpoint: str | os.PathLike, name: str, **hub_options: Any) -> tuple[str | None, str]:
    """One of our files of a checkpoint, in a folder or on the Hub, as [`find_file`] gives it."""
    found, reason = find_file(checkpoint, f"{FOLDER}/{name}", **hub_options)
    return (found, reason) if found or reason else find_file(checkpoint, name, **hub_options)


def find_file(checkpoint: str | os.PathLike, name: str, **hub_options: Any) -> tuple[str | None, str]:
    """A file of a folder, or of a repository on the Hub, which is downloaded if need be.

    Args:
        checkpoint (`str`): a folder, or the name of a repository.
        name (`str`): of the file, relative to that.
        hub_options: `revision`, `token`, `cache_dir`, `subfolder`.

    Returns:
        `tuple[str | None, str]`: its path, or `None` if there is no such file; and why the place could not be looked at.
    """
    from transformers.utils import cached_file

    try:
        return cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **hub_options), ""
    except (OSError, ValueError) as error:
        return None, " ".join(str(error).split())[:300]


def saved_config(model: str | os.PathLike, **hub_options: Any) -> dict[str, Any]:
    """The config that made a pruned model, as its `config.json` holds it.

    Args:
        model (`str`): a folder, or the name of a repository on the Hub.
        hub_options: passed to `PreTrainedConfig.get_config_dict`, e.g. `revision`, `token`.

    Raises:
        HeaprError: if the model cannot be found or was not pruned by this package.
    """
    from transformers import PreTrainedConfig

    try:
        saved, _ = PreTrainedConfig.get_config_dict(str(model), **hub_options)
    except (OSError, ValueError) as error:
        raise HeaprError(f"model={str(model)!r}: has no config.json that can be read ({reason_of(error)})") from error
    if saved.get("heapr_config") is None:
        raise HeaprError(f"model={str(model)!r}: config.json has no heapr_config; name a model that was pruned")
    return saved["heapr_config"]
