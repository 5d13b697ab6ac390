# Licensed under the Apache License, Version 2.0
"""Where the models of a recovery run are."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch


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
