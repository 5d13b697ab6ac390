# Licensed under the Apache License, Version 2.0
"""optimum-heapr: prunes Mixture-of-Experts language models at the granularity of atomic experts (HEAPr).

Importing this package makes transformers' auto classes know pruned models; nothing heavy is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .modeling.auto import register


if TYPE_CHECKING:
    from .calibration.statistics import AtomicStatistics
    from .configuration import HeaprConfig
    from .planning.plan import PruningPlan
    from .pruner import HeaprPruner
    from .recovery.configuration import RecoveryConfig
    from .utils.errors import HeaprError


__version__ = "0.1.0.dev0"
__all__ = ["AtomicStatistics", "HeaprConfig", "HeaprError", "HeaprPruner", "PruningPlan", "RecoveryConfig"]

_HOMES = {
    "AtomicStatistics": "calibration.statistics",
    "HeaprConfig": "configuration",
    "HeaprError": "utils.errors",
    "HeaprPruner": "pruner",
    "PruningPlan": "planning.plan",
    "RecoveryConfig": "recovery.configuration",
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register()
