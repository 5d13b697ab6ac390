# Licensed under the Apache License, Version 2.0
"""Where a model computes, outside of calibration, which leaves that to accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def has_accelerator() -> bool:
    """Whether there is one, and nobody asked accelerate for the CPU."""
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    return torch.accelerator.is_available() and not wants_cpu


def default_device() -> torch.device:
    """The accelerator of this process, or the CPU if there is none."""
    if not has_accelerator():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator().type
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))


def without_storage(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model that `make` makes, on the meta device, its weights tied; initialising what has no values takes longest, and is left out."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"):
        with no_init_weights():
            model = make()
        model.init_weights()  # on this device, ties alone
    return model


def place(model: PreTrainedModel) -> PreTrainedModel:
    """Moves a model to the accelerator of this process, if there is one and no `device_map` has placed it."""
    if getattr(model, "hf_device_map", None) or not has_accelerator():
        return model
    return model.to(default_device())
