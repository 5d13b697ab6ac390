# Licensed under the Apache License, Version 2.0
"""Memory there is, and how layers do with less: inputs on a budget, weights offloaded, activations computed twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch


def activation_budget(activation_memory: int | None) -> int:
    """Bytes of layer inputs that are kept on the host: as asked for, or a quarter of what is free."""
    if activation_memory is not None:
        return activation_memory
    return available_bytes(torch.device("cpu")) // processes_here() // 4


def processes_here() -> int:
    """Processes of this run that share the memory of this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_bytes(device: torch.device) -> int:
    """Memory of a device that new tensors can have."""
    if device.type == "cuda":
        # What PyTorch keeps of tensors that are gone counts as taken for the driver, but not for new tensors.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil

    return psutil.virtual_memory().available


def has_offloaded_weights(model: torch.nn.Module) -> bool:
    """Whether weights lie elsewhere than on the device that computes, and are brought in layer by layer."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


@contextmanager
def checkpointed_layers(model: torch.nn.Module, enabled: bool) -> Iterator[None]:
    """Keeps only the inputs of the decoder layers for the backward, which computes the rest again.

    Weights that are brought in for a layer can then be dropped behind it: what the backward needs of them would otherwise
    keep them all. The second forward runs to its end, as the hook that drops them comes last. The model is to be in
    evaluation mode; its layers, but nothing in them, are put into training mode, without which they do not checkpoint.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = (
        [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if enabled else []
    )
    checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, early_stop=False)
    before = [{name: layer.__dict__.get(name) for name in _SWITCHES} for layer in layers]
    try:
        for layer in layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func, layer.training = True, checkpoint, True
        yield
    finally:
        for layer, values in zip(layers, before):
            for name, value in values.items():
                if value is None:
                    layer.__dict__.pop(name, None)
                else:
                    layer.__dict__[name] = value


_SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")
