# Licensed under the Apache License, Version 2.0
"""Where the models of a recovery run are, and how their experts are computed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .targets import expert_paths


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def has_accelerator() -> bool:
    """Whether there is one, and nobody asked accelerate for the CPU."""
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    return torch.accelerator.is_available() and not wants_cpu


def place(model: PreTrainedModel) -> PreTrainedModel:
    """Moves a model to the accelerator of this process, if there is one and no `device_map` has placed it."""
    if getattr(model, "hf_device_map", None) or not has_accelerator():
        return model
    kind = torch.accelerator.current_accelerator().type
    return model.to(torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))))


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
