# Licensed under the Apache License, Version 2.0
"""Experts that checkpoints store the other way round than transformers holds them, as those of Qwen3-VL-MoE.

transformers 5 turns such a tensor when it loads one whose shape is not the parameter's, and by the same test leaves it as it is
when it saves: what it writes, transformers 4, vLLM and converters that know the checkpoints of the Hub cannot read. So stock
layouts are written turned back, as the family's checkpoints are, and of a width that makes a matrix square, whose shape does
not say how it is stored, there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, Transpose, WeightConverter

from ..experts import model_name
from ..surgery.stock import stock_width
from ..utils.errors import HeaprError


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform

    from ..experts import ExpertBlock
    from ..planning.plan import PruningPlan


def written_as_stored(model: PreTrainedModel) -> list[WeightTransform]:
    """Has `save_pretrained` of a stock model write experts the way round in which checkpoints of its family store them.

    Args:
        model (`PreTrainedModel`): with or without storage; nothing changes where it is the same way.

    Returns:
        `list`: the conversions that saving reverts.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # as transformers does where a model was not loaded, or is not any more what was loaded
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
    conversions = copy.deepcopy(conversions)
    turning = list(_turning(conversions))
    for operation in turning:
        operation.check_dims = False
    if turning:
        model._weight_conversions = conversions
    return conversions


def check_orientation(model: PreTrainedModel, blocks: list[ExpertBlock], plan: PruningPlan) -> None:
    """Refuses a stock layout whose matrices would not say by their shape which way round they are.

    Raises:
        HeaprError: naming the width.
    """
    if plan.config.layout == "variable" or not list(_turning(get_model_conversion_mapping(model, add_legacy=False))):
        return
    width, hidden = stock_width(plan), blocks[0].hidden_size
    if hidden in (width, 2 * width):
        raise HeaprError(
            f"layout={plan.config.layout!r}: at the width {width} and a hidden size of {hidden} a matrix of {model_name(model)!r} is "
            "square, and its checkpoints are told apart from turned ones by shape alone; plan another ratio or width_multiple, or "
            "use layout='variable'"
        )


def _turning(conversions: list[WeightTransform]) -> Iterator[Transpose]:
    for entry in conversions:
        for operation in entry.operations if isinstance(entry, WeightConverter) else ():
            if isinstance(operation, Transpose) and operation.check_dims:
                yield operation
