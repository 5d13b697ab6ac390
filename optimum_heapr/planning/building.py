# Licensed under the Apache License, Version 2.0
"""How a plan is made: ranked, allocated and estimated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..criteria import importance
from ..criteria.obs import store_removal_curves
from .allocation import choose, indices_of
from .distribution import importance_distribution
from .dropping import dropped_experts
from .estimate import estimated_loss_increase, increase_by_source
from .goal import Goal
from .plan import PruningPlan


if TYPE_CHECKING:
    from ..calibration.statistics import AtomicStatistics
    from ..configuration import HeaprConfig


def build_plan(statistics: AtomicStatistics, config: HeaprConfig) -> PruningPlan:
    """What [`~optimum_heapr.planning.plan.PruningPlan.build`] gives."""
    goal = Goal.of(config, statistics)
    if config.criterion == "obs":
        store_removal_curves(statistics, config.ridge)  # scores, estimate and the next plan are look-ups then
    options = (config.criterion, config.seed, config.reduction, config.ridge, config.reduction_over_sources)
    scores = importance(statistics, *options)
    dropped = dropped_experts(statistics, config)
    stays = choose(scores, config, statistics.unreached, goal, dropped)
    distribution = importance_distribution(scores, stays)
    del scores  # of millions; what follows has its own
    kept = {path: indices_of(stays.pop(path)) for path in statistics.blocks}
    return PruningPlan(
        kept=kept,
        original_width={path: block.width for path, block in statistics.blocks.items()},
        config=config,
        model=statistics.fingerprint["model"],
        loss_increase={
            path: estimated_loss_increase(block, kept[path], statistics.num_tokens, config)
            for path, block in statistics.blocks.items()
        },
        unreached=statistics.unreached,
        data=statistics.fingerprint["data"],
        tokens={path: block.token_count.tolist() for path, block in statistics.blocks.items()},
        storage=statistics.fingerprint.get("storage", {}),
        importance=distribution,
        dropped=dropped,
        sources=increase_by_source(statistics, kept),
    )
