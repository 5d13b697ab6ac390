# Licensed under the Apache License, Version 2.0
"""In which types a model holds its weights, and its routed experts: what a quantizer did, and what it left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .size import model_in, routed_experts


if TYPE_CHECKING:
    from transformers import PreTrainedModel


BytesByType = dict[str, int]


@dataclass(frozen=True)
class StoredWeights:
    """
    Attributes:
        weights (`dict[str, int]`): bytes of all that the model stores, by type: `bfloat16`, `int8`, `uint8`, …; tied weights once.
        experts (`dict[str, int]`): of that the routed experts', with the scales that belong to them; empty for a dense model.
    """

    weights: BytesByType
    experts: BytesByType

    @classmethod
    def of(cls, model: PreTrainedModel) -> StoredWeights:
        """Looks at every tensor of the state, and in it where one tensor holds several, as those of torchao do.

        A model's own count takes such a tensor for what it stands for: 16 bits of bfloat16 where 4 are stored.

        Args:
            model (`PreTrainedModel`): of any kind, quantized or not, or the `PeftModel` around it, whose adapters of experts count as
                theirs; weights are not read.
        """
        inside = model_in(model)
        around = next(path for path, module in model.named_modules() if module is inside)
        paths = tuple(f"{around}.{path}.".lstrip(".") for path in routed_experts(model))
        weights: BytesByType = {}
        experts: BytesByType = {}
        seen: set[tuple] = set()
        for name, value in model.state_dict().items():
            # Where experts were replaced by a quantizer they are not found by structure; families agree on their name.
            is_expert = name.startswith(paths) if paths else ".experts." in name
            for tensor in _plain_tensors(value):
                place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape)
                if place in seen:  # tied
                    continue
                seen.add(place)
                kind = str(tensor.dtype).removeprefix("torch.")
                for found in (weights, experts) if is_expert else (weights,):
                    found[kind] = found.get(kind, 0) + tensor.numel() * tensor.element_size()
        return cls(weights, experts)


def _plain_tensors(value: object) -> Iterator[torch.Tensor]:
    """The tensors that one entry of a state is stored in; other entries have none."""
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        for name in names:
            yield from _plain_tensors(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value
