# Licensed under the Apache License, Version 2.0
"""Which experts a plan must leave whole: patterns over block paths, and what calibration never saw."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ..utils.errors import HeaprError


if TYPE_CHECKING:
    from ..configuration import HeaprConfig


_EXPERTS = re.compile(r"\d+(,\d+)*")


def protected_experts(config: HeaprConfig, experts: dict[str, int]) -> dict[str, list[int]]:
    """The experts that `config.protect` names, by block path; blocks without any are left out.

    `protect` is a list of patterns with spaces between them. Each is the path of an expert block, in which `*`, `?` and
    `[...]` have the meaning that they have in file names, and `*` also matches dots; a colon and numbers name some of
    its experts: `model.layers.0.* model.layers.5.mlp.experts:3,7`.

    Args:
        config (`HeaprConfig`): what was asked for.
        experts (`dict[str, int]`): how many experts each block of the model has, by path.

    Raises:
        HeaprError: if a pattern matches no block or names an expert that a block does not have, or if the allocation
            cannot leave experts whole.
    """
    if config.protect is None:
        return {}
    found: dict[str, set[int]] = {}
    for pattern in config.protect.split():
        path_pattern, colon, numbers = pattern.partition(":")
        if colon and not _EXPERTS.fullmatch(numbers):
            raise HeaprError(
                f"protect={pattern!r}: what follows the colon must be numbers of experts, as in {path_pattern}:3,7"
            )
        paths = [path for path in experts if fnmatchcase(path, path_pattern)]
        if not paths:
            first, last = next(iter(experts)), list(experts)[-1]
            raise HeaprError(
                f"protect={pattern!r}: matches no expert block; they are called {first} to {last}, and * stands for any part"
            )
        for path in paths:
            chosen = set(map(int, numbers.split(","))) if colon else set(range(experts[path]))
            if max(chosen) >= experts[path]:
                raise HeaprError(
                    f"protect={pattern!r}: {path} has no expert {max(chosen)}; its experts are 0 to {experts[path] - 1}"
                )
            found.setdefault(path, set()).update(chosen)
    if config.allocation == "uniform":
        raise HeaprError(
            f"protect={config.protect!r}: allocation='uniform' gives every expert the same width; use global or layer"
        )
    return {path: sorted(found[path]) for path in experts if path in found}
