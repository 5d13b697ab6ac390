# Licensed under the Apache License, Version 2.0
"""Artefacts as `--json` prints them: plain JSON types, numbers in full."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..planning.size import planned_sizes
from ..report.content import build_report


if TYPE_CHECKING:
    from ..calibration.statistics import AtomicStatistics
    from ..planning.comparison import BlockComparison
    from ..planning.plan import PruningPlan


def statistics_document(statistics: AtomicStatistics) -> dict[str, Any]:
    """What was measured, on what, and how often each expert was met; not the sums themselves."""
    blocks = statistics.blocks.values()
    return {
        **statistics.fingerprint,
        "blocks": [
            {"path": path, "experts": block.num_experts, "width": block.width, "tokens": block.token_count.tolist()}
            for path, block in statistics.blocks.items()
        ],
        "unreached": statistics.unreached,
        "serves_obs": all(block.has_grams or block.has_curves for block in blocks),
        "serves_compensation": all(block.activation_gram_sum is not None for block in blocks),
        **({} if statistics.cost is None else {"cost": asdict(statistics.cost)}),
    }


def plan_document(plan: PruningPlan, model: str | None = None) -> dict[str, Any]:
    """The report of a plan, and what else its table says.

    Args:
        plan (`PruningPlan`): applied or not.
        model (`str`, *optional*): what the unpruned model is called.
    """
    before, after = planned_sizes(plan)
    return {
        **build_report(plan, model or plan.model["model_type"]),
        "parameter_ratio": plan.parameter_ratio,
        "planned_size": {"before": asdict(before), "after": asdict(after)},
        "search": plan.search,
    }


def comparison_document(blocks: list[BlockComparison]) -> list[dict[str, Any]]:
    """Two plans, block by block, and all blocks at the end."""
    return [{**asdict(block), "overlap": block.overlap, "by_chance": block.by_chance} for block in blocks]
