# Licensed under the Apache License, Version 2.0
"""What identifies a model: hashes over names, shapes and some values of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from .sizing import describe_routing
from .utils.errors import HeaprError
from .utils.sharded import is_shard, whole


if TYPE_CHECKING:
    from .experts import ExpertBlock


SAMPLED_VALUES = 64
"""How many values of each weight identify a model."""


HASH_SCHEME = "2:"
"""Stands before a hash of values and says how it is made. Hashes of other schemes, such as earlier ones without a prefix,
cannot be compared with it."""


def model_fingerprint(model: torch.nn.Module, blocks: list[ExpertBlock], gathered: bool = False) -> dict[str, Any]:
    """What identifies a model: its type, a hash over names and shapes of its weights, and two over some of their values.

    `weights` samples every weight, spread evenly; `experts` samples the first expert of each block, which can be read
    from a checkpoint without loading it. Values are rounded to bfloat16, and those that float16 cannot hold to as many
    digits are left out, so that the precision a checkpoint was loaded in does not matter but a fine-tuned sibling of the
    same shape does. (One exception: float32 weights loaded in float16 are rounded twice, and are taken for another
    model.) Either is `None` where a weight is offloaded, or spread over processes.

    Args:
        model (`PreTrainedModel`): the model.
        blocks (`list[ExpertBlock]`): its expert blocks.
        gathered (`bool`): gather what is spread over processes, one weight at a time; all of them must do so at once.
    """
    names = hashlib.sha256()
    for name, parameter in model.named_parameters():
        names.update(f"{name}{tuple(parameter.shape)}".encode())
    first = blocks[0]
    biases = 2 if first.module.has_bias else 0
    readable = gathered or not any(map(is_shard, model.parameters()))
    return {
        "model_type": model.config.model_type,
        "experts_per_token": getattr(model.config.get_text_config(), "num_experts_per_tok", None),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameters_per_atomic_expert": 3 * first.hidden_size + biases,
        "shapes": names.hexdigest()[:16],
        "experts": hash_of_values(block.down_rows(0) for block in blocks) if readable else None,
        "weights": hash_of_values(model.parameters()) if readable else None,
    }


def storage_of(model: torch.nn.Module, blocks: list[ExpertBlock]) -> dict[str, Any]:
    """Bytes of all weights, tied ones once, and of one atomic expert, in the dtypes in which they are loaded, and `routing`: what
    [`~optimum_heapr.sizing.describe_routing`] says.

    Not part of what identifies a model: the same one may be loaded in another dtype.
    """
    first = blocks[0]
    biases = 2 if first.module.has_bias else 0
    return {
        "num_bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "bytes_per_atomic_expert": (3 * first.hidden_size + biases) * first.module.down_proj.element_size(),
        "routing": describe_routing(model, blocks),
    }


def hash_of_values(tensors: Iterable[torch.Tensor]) -> str | None:
    """Hash over `SAMPLED_VALUES` of each tensor, gathered where it is spread over processes; `None` if one has no storage."""
    tensors = list(tensors)
    if any(tensor.device.type == "meta" for tensor in tensors):
        return None
    return hash_of_samples(sampled_values(whole(tensor)) for tensor in tensors)


def hash_of_samples(samples: Iterable[bytes]) -> str:
    """Hash over what [`sampled_values`] gave for each of several tensors."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample)
    return HASH_SCHEME + digest.hexdigest()[:16]


_FLOAT16 = torch.finfo(torch.float16)


def _comparable(first: str | None, second: str | None) -> bool:
    """Whether two hashes of values say anything about one another."""
    return None not in (first, second) and len({value.rpartition(":")[0] for value in (first, second)}) == 1


def sampled_values(tensor: torch.Tensor) -> bytes:
    """`SAMPLED_VALUES` of a tensor, spread evenly."""
    step = max(1, tensor.numel() // SAMPLED_VALUES)
    sample = tensor.detach().flatten()[::step].to(torch.bfloat16)
    size = sample.abs()
    sample = sample.where((_FLOAT16.smallest_normal <= size) & (size <= _FLOAT16.max), 0)
    return sample.contiguous().view(torch.int16).cpu().numpy().tobytes()


def check_same_model(expected: dict[str, Any], actual: dict[str, Any], artefact: str) -> None:
    """Compares two model fingerprints. Values of weights that one of them could not read, or hashed in the way of an earlier
    version, are not compared.

    Raises:
        HeaprError: naming the first part that differs, both values, and the next step.
    """
    for key in expected:
        if key in ("experts", "weights") and not _comparable(expected[key], actual.get(key)):
            continue
        if expected[key] != actual.get(key):
            raise HeaprError(
                f"{artefact}: made for a model with {key} {json.dumps(expected[key])}, this model has "
                f"{json.dumps(actual.get(key))}; calibrate this model"
            )
