# Licensed under the Apache License, Version 2.0
"""Which experts go from the routers: of each layer those that would cost least, of each group of experts as many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..criteria import expert_importance
from ..utils.errors import HeaprError


if TYPE_CHECKING:
    import torch

    from ..calibration.statistics import AtomicStatistics
    from ..configuration import HeaprConfig


def dropped_experts(
    statistics: AtomicStatistics, config: HeaprConfig, scores: dict[str, torch.Tensor] | None = None
) -> dict[str, list[int]]:
    """The experts that go from the router, by block path, ascending; nothing where all stay.

    Args:
        statistics (`AtomicStatistics`): what calibration measured.
        config (`HeaprConfig`): `num_experts` says how many stay, the criterion which.
        scores (`dict[str, torch.Tensor]`, *optional*): importance of whole experts by block, [E], in place of the criterion's.

    Raises:
        HeaprError: if the model cannot have so many, naming why.
    """
    if config.num_experts is None:
        return {}
    kept = _number(config)
    routing = routing_of(statistics, kept)
    if not _num_dropped(statistics, kept):
        return {}
    groups = routing["groups"]
    if scores is None:
        options = (config.criterion, config.seed, config.reduction, config.ridge, config.reduction_over_sources)
        scores = expert_importance(statistics, *options)
    dropped = {}
    for path, score in scores.items():
        # Of equal ones the lower index stays.
        order = score.view(groups, -1).sort(dim=1, descending=True, stable=True).indices[:, kept // groups :]
        first = order.new_tensor(range(0, len(score), len(score) // groups)).unsqueeze(1)
        dropped[path] = sorted((order + first).flatten().tolist())
    return dropped


def saved_by_dropping(statistics: AtomicStatistics, config: HeaprConfig, unit: str) -> int:
    """What goes with the dropped experts besides their atomic experts: rows of routers, and biases of outputs.

    Args:
        statistics, config: as for [`dropped_experts`].
        unit (`str`): `parameters` or `bytes`.
    """
    if config.num_experts is None:
        return 0
    kept = _number(config)
    return _num_dropped(statistics, kept) * routing_of(statistics, kept)[unit]


def routing_of(statistics: AtomicStatistics, kept: int) -> dict[str, Any]:
    """What the statistics say about the routers of their model, if each can keep so many experts.

    Raises:
        HeaprError: if not, or they say nothing.
    """
    routing = statistics.fingerprint.get("storage", {}).get("routing")
    if routing is None:
        raise HeaprError(
            f"num_experts={kept}: the statistics do not say what routers the model has; calibrate again, or leave num_experts out"
        )
    if "refusal" in routing:
        raise HeaprError(routing["refusal"])
    experts = _num_experts(statistics)
    least = routing["experts_per_token"] or 1
    if not least <= kept <= experts:
        raise HeaprError(
            f"num_experts={kept}: must lie between {least}, which a token gets, and {experts}, which a layer has"
        )
    groups = routing["groups"]
    if groups > 1:
        # Groups are ranked by their best two.
        in_group = max(2, -(-least // routing["groups_per_token"]))
        if kept % groups or kept // groups < in_group:
            raise HeaprError(
                f"num_experts={kept}: the router ranks {groups} groups of experts, of which each keeps as many, {in_group} at least; "
                f"use a multiple of {groups} from {groups * in_group} to {experts}"
            )
    return routing


def _number(config: HeaprConfig) -> int:
    if config.num_experts == "auto":
        raise HeaprError(
            "num_experts='auto': is measured with the model and the text, which HeaprPruner.plan() has; plan with that, or name "
            "a number"
        )
    return int(config.num_experts)


def _num_dropped(statistics: AtomicStatistics, kept: int) -> int:
    return _num_experts(statistics) - kept


def _num_experts(statistics: AtomicStatistics) -> int:
    return next(iter(statistics.blocks.values())).num_experts
