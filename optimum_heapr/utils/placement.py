# Licensed under the Apache License, Version 2.0
"""Where a model computes, outside of calibration, which leaves that to accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.overrides import TorchFunctionMode


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


class _Uninitialised(TorchFunctionMode):
    """Leaves out what `torch.nn.init` does. transformers has `no_init_weights`, which is for all threads, and not for two at once."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def without_storage(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model that `make` makes, on the meta device; initialising what has no values takes longest, and is left out."""
    with torch.device("meta"), _Uninitialised():
        model = make()
    model.tie_weights()  # transformers 5.24 does so where weights have values
    return model


def place(model: PreTrainedModel) -> PreTrainedModel:
    """Moves a model to the accelerator of this process, if there is one and no `device_map` has placed it."""
    if getattr(model, "hf_device_map", None) or not has_accelerator():
        return model
    return model.to(default_device())
