# Licensed under the Apache License, Version 2.0
"""A model as if it were pruned, without cutting it: to measure many plans with one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..experts import find_expert_blocks
from .apply import check_plan


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..planning.plan import PruningPlan


@contextmanager
@torch.no_grad()
def masked(model: PreTrainedModel, plan: PruningPlan) -> Iterator[None]:
    """Until the block ends, the down projections of what the plan removes are zero; then they are as before, bit for bit.

    The output is that of the pruned model without compensation, for every layout. Memory is needed for a copy of the columns of
    the down projections that are zeroed: a third of what the plan removes.

    Args:
        model (`PreTrainedModel`): in memory.
        plan (`PruningPlan`): what stays.

    Raises:
        HeaprError: if the plan was made for another model.
    """
    check_plan(model, plan)
    before: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    try:
        for block in find_expert_blocks(model):
            for expert, kept in enumerate(plan.kept[block.path]):
                rows, gone = block.down_rows(expert), torch.ones(block.width, dtype=torch.bool)
                gone[kept] = False
                gone = gone.nonzero().squeeze(1).to(rows.device)
                before.append((rows, gone, rows[gone]))
                rows[gone] = 0
        yield
    finally:
        for rows, gone, values in before:
            rows[gone] = values
