# Licensed under the Apache License, Version 2.0
"""How much goes: what a config asks for, as a share of the atomic experts that statistics are of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..utils.errors import HeaprError
from ..utils.sizes import parse_size
from .dropping import saved_by_dropping
from .protection import protected_experts


if TYPE_CHECKING:
    from ..calibration.statistics import AtomicStatistics
    from ..configuration import HeaprConfig


@dataclass(frozen=True)
class Goal:
    """
    Attributes:
        ratio (`float`): share of the routed atomic experts that goes; with the allocation `layer`, of each layer that gives any.
        asked (`str`): the option that asks for it, as messages name it.
        is_bound (`bool`): whether what stays may not be more. Where widths cannot hit it, more goes then, and not less.
    """

    ratio: float
    asked: str
    is_bound: bool = False

    @classmethod
    def of_ratio(cls, config: HeaprConfig) -> Goal:
        """That of a config which names a ratio."""
        return cls(config.ratio, f"ratio={config.ratio}")

    @classmethod
    def of(cls, config: HeaprConfig, statistics: AtomicStatistics) -> Goal:
        """That of any config.

        Args:
            config (`HeaprConfig`): what was asked for.
            statistics (`AtomicStatistics`): shapes, and the sizes in the fingerprint, are read.

        Raises:
            HeaprError: if the model has no more than the target, or more besides its routed experts, or the statistics do
                not say how many bytes it takes; and for `max_loss_increase`, which only measuring turns into a ratio.
        """
        name, value = config.goal
        if name == "ratio":
            return cls.of_ratio(config)
        if name == "max_loss_increase":
            raise HeaprError(
                f"{name}={value}: is measured with the model, and a plan from statistics alone has none; use HeaprPruner.plan() with "
                "these statistics, or see what each ratio costs with HeaprPruner.frontier()"
            )
        asked = f"{name}={value!r}"
        whole, each, target, unit = _sizes(config, statistics)
        sizes = {path: block.num_experts * block.width for path, block in statistics.blocks.items()}
        experts = {path: block.num_experts for path, block in statistics.blocks.items()}
        protected = protected_experts(config, experts) if config.allocation == "layer" else {}
        # Layer by layer the ratio is a share of those layers that give anything at all.
        giving = sum(size for path, size in sizes.items() if len(protected.get(path, [])) < experts[path])
        total = sum(sizes.values())
        removed = -(-(whole - target) // each)
        if not 0 < removed < total:
            raise HeaprError(
                f"{asked}: must lie between {whole - total * each:,}{unit}, what is left without routed experts, and "
                f"{whole:,}{unit}, what the model has"
            )
        if removed >= giving:
            raise HeaprError(
                f"{asked}: protect={config.protect!r} leaves {whole - giving * each:,}{unit} at least; ask for more than "
                "that, or protect less"
            )
        return cls(removed / giving, f"{asked} (ratio={removed / giving:.4f})", is_bound=True)


def _sizes(config: HeaprConfig, statistics: AtomicStatistics) -> tuple[int, int, int, str]:
    """What the model has, but for rows that go with dropped experts, what one atomic expert has, what may be left, and the unit."""
    if config.target_size is None:
        model = statistics.fingerprint["model"]
        whole = model["num_parameters"] - saved_by_dropping(statistics, config, "parameters")
        return whole, model["parameters_per_atomic_expert"], config.target_parameters, ""
    storage = statistics.fingerprint.get("storage")
    if storage is None:
        raise HeaprError(
            f"target_size={config.target_size!r}: the statistics do not say how many bytes the model takes; calibrate "
            "again, or use target_parameters"
        )
    target = parse_size("target_size", config.target_size)
    whole = storage["num_bytes"] - saved_by_dropping(statistics, config, "bytes")
    return whole, storage["bytes_per_atomic_expert"], target, " bytes"
