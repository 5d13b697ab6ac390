# Licensed under the Apache License, Version 2.0
"""How the experts of the models of a recovery run are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .targets import expert_paths


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def experts_of_any_width(model: PreTrainedModel) -> Iterator[None]:
    """Until the block ends, experts run as `eager` where transformers' `grouped_mm` would refuse their width.

    It takes rows of whole 16 bytes, which experts in the stock storage, [experts, rows, columns], may not have.
    """
    weights = [model.get_submodule(path).down_proj for path in expert_paths(model)]
    stock = [weight for weight in weights if weight.dim() == 3]
    if all(size * weight.element_size() % 16 == 0 for weight in stock for size in weight.shape[1:]):
        yield
        return
    previous = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(previous)
