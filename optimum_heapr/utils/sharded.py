# Licensed under the Apache License, Version 2.0
"""Weights of which a process has a part: the DTensors of tensor parallelism and of FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


def is_shard(tensor: torch.Tensor) -> bool:
    """Whether other processes have parts of this tensor."""
    return hasattr(tensor, "full_tensor")  # a DTensor; to import its class takes long


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether other processes have parts of the weights of a model."""
    return any(map(is_shard, model.parameters()))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all of its values. What is spread over processes is gathered, so that all of them must ask for it."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


@contextmanager
def whole_parameters(module: torch.nn.Module) -> Iterator[None]:
    """Until the block ends, the parameters of a module itself are gathered, as by [`whole`]; not those of modules in it."""
    shards = {name: part for name, part in module.named_parameters(recurse=False) if is_shard(part)}
    try:
        module._parameters.update({name: whole(part.detach()) for name, part in shards.items()})
        yield
    finally:
        module._parameters.update(shards)
