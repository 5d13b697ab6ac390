# Licensed under the Apache License, Version 2.0
"""A model as if it were pruned, without cutting it: to measure many plans with one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .apply import check_compensation, check_plan, compensate_model
from .rerouting import Rerouting


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.statistics import AtomicStatistics
    from ..planning.plan import PruningPlan
    from ..text.samples import CalibrationData


@contextmanager
@torch.no_grad()
def masked(
    model: PreTrainedModel,
    plan: PruningPlan,
    statistics: AtomicStatistics | None = None,
    data: CalibrationData | None = None,
) -> Iterator[None]:
    """Until the block ends, the down projections of what the plan removes are zero, and routers do not know the experts that it
    drops; then they are as before, bit for bit.

    The output is that of the pruned model, for every layout, and with the compensation that the plan asks for. Memory is
    needed for a copy of the columns of the down projections that are zeroed, a third of what the plan removes, or with
    compensation for one of all down projections, or of all that is trained.

    Args:
        model (`PreTrainedModel`): in memory.
        plan (`PruningPlan`): what stays; it is not changed.
        statistics (`AtomicStatistics`, *optional*): second-order ones, needed to compensate within experts.
        data (`CalibrationData`, *optional*): needed to compensate over blocks.

    Raises:
        HeaprError: if the plan was made for another model, or asks for compensation without what that needs.
    """
    blocks = check_plan(model, plan)
    check_compensation(plan, statistics, data)
    rerouting = Rerouting.of(model, blocks, plan)
    before: list[tuple[torch.Tensor, torch.Tensor | slice, torch.Tensor]] = []

    def keep(weight: torch.Tensor, rows: torch.Tensor | slice) -> None:
        before.append((weight, rows, weight[rows].clone()))

    def keep_all(weights: list[torch.Tensor]) -> None:
        for weight in weights:
            keep(weight, slice(None))

    try:
        compensate_model(model, replace(plan, compensation={}, reconstruction={}), blocks, statistics, data, keep_all)
        for block in blocks:
            for expert, kept in enumerate(plan.kept[block.path]):
                rows, gone = block.down_rows(expert), torch.ones(block.width, dtype=torch.bool)
                gone[kept] = False
                gone = gone.nonzero().squeeze(1).to(rows.device)
                if not plan.config.compensate:
                    keep(rows, gone)
                rows[gone] = 0
        with nullcontext() if rerouting is None else rerouting.active(blocks):
            yield
    finally:
        for weight, rows, values in reversed(before):
            weight[rows] = values
