# Licensed under the Apache License, Version 2.0
"""How large a model is, and how much of it one token uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..experts import experts_per_token, find_expert_blocks
from ..utils.errors import HeaprError


if TYPE_CHECKING:
    from transformers import PreTrainedModel


Counts = dict[str, list[int]]
"""By path of the expert block, one number an expert."""


@dataclass(frozen=True)
class ModelSize:
    """
    Attributes:
        parameters (`int`): all of them, tied ones once.
        weight_bytes (`int`): what they take in the dtypes in which they are loaded.
        active_parameters (`int`, *optional*): those that one token uses on average: of the routed experts what its
            experts hold, and everything else. `None` where the number of experts a token is not known.
        flops_per_token (`int`, *optional*): two for each active parameter that is multiplied with: the embedding table
            is looked up and counts only as a head. Attention over the context, which pruning does not change, is left
            out.
    """

    parameters: int
    weight_bytes: int
    active_parameters: int | None
    flops_per_token: int | None

    @classmethod
    def of(cls, model: PreTrainedModel, tokens: Counts | None = None) -> ModelSize:
        """Sizes of any model, pruned or not, with storage or without.

        Args:
            model (`PreTrainedModel`): only shapes are read.
            tokens (`dict[str, list[int]]`, *optional*): how many tokens each expert gets, as
                [`routing_counts`] or a calibration found; experts of different widths then count by how often they are
                used, and otherwise all the same.
        """
        parameters = list(model.parameters())
        count = sum(parameter.numel() for parameter in parameters)
        active = _active_parameters(model, count, tokens or {})
        return cls(
            parameters=count,
            weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
            active_parameters=active,
            flops_per_token=None if active is None else 2 * (active - _looked_up(model)),
        )


@dataclass(frozen=True)
class RoutedExperts:
    """The routed experts of one layer, of a pruned model or another.

    Attributes:
        module (`nn.Module`): holds their weights.
        widths (`list[int]`): atomic experts of each.
        parameters_each (`int`): of one atomic expert.
    """

    module: torch.nn.Module
    widths: list[int]
    parameters_each: int


def routed_experts(model: PreTrainedModel) -> dict[str, RoutedExperts]:
    """The expert blocks of a model by path; none for a dense model, or one whose experts are not on the interface.

    Args:
        model (`PreTrainedModel`): may be in a `PeftModel`; paths are those inside the model itself, as plans have them.
    """
    model = model_in(model)
    widths = getattr(model.config, "expert_widths", None)
    if widths is not None:
        modules = {path: _below_adapters(model.get_submodule(path)) for path in widths}
        return {
            path: RoutedExperts(module, widths[path], 3 * _hidden_size(module) + 2 * bool(module.has_bias))
            for path, module in modules.items()
        }
    try:
        blocks = find_expert_blocks(model)
    except HeaprError:
        return {}
    return {
        block.path.partition(".base_layer")[0]: RoutedExperts(  # PEFT wraps a module whose parameters it adapts
            block.module, [block.width] * block.num_experts, 3 * block.hidden_size + 2 * bool(block.module.has_bias)
        )
        for block in blocks
    }


@contextmanager
def routing_counts(model: PreTrainedModel) -> Iterator[Counts]:
    """Counts the tokens that each routed expert gets until the block ends; padding counts as well."""
    counts: Counts = {}

    def count(path: str, experts: int):
        def hook(module, arguments, options) -> None:
            index = options["top_k_index"] if "top_k_index" in options else arguments[1]
            weight = options["top_k_weights"] if "top_k_weights" in options else arguments[2]
            # For tokens that get fewer, some routers name an expert that is none, others one with a weight of 0.
            found = torch.bincount(index[weight != 0], minlength=experts)[:experts].tolist()
            counts[path] = [before + now for before, now in zip(counts.get(path, [0] * experts), found)]

        return hook

    handles = [
        block.module.register_forward_pre_hook(count(path, len(block.widths)), with_kwargs=True)
        for path, block in routed_experts(model).items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _active_parameters(model: PreTrainedModel, parameters: int, tokens: Counts) -> int | None:
    blocks, top_k = routed_experts(model), experts_per_token(model)
    if not blocks:
        is_moe = any("expert" in name for name, _ in model.named_modules())
        return None if is_moe else parameters  # experts that cannot be told apart, or none
    if top_k is None:
        return None
    active = float(parameters)
    for path, block in blocks.items():
        shares = tokens.get(path) or [1] * len(block.widths)
        total = sum(shares) or 1
        used = top_k * sum(share * width for share, width in zip(shares, block.widths)) / total
        active -= block.parameters_each * (sum(block.widths) - used)
    return round(active)


def model_in(model: torch.nn.Module) -> PreTrainedModel:
    """The model itself, which a `PeftModel` holds with the adapters in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _below_adapters(module: torch.nn.Module) -> torch.nn.Module:
    """The experts themselves, which PEFT wraps once for each parameter that it adapts."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _hidden_size(experts: torch.nn.Module) -> int:
    """Of packed experts, or of those made linear layers, which have no such weight any more."""
    down = getattr(experts, "down_proj", None)
    return experts.hidden_size if down is None else down.shape[-1]


def _looked_up(model: PreTrainedModel) -> int:
    """Parameters of the embedding table, unless it is the head as well."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings or (head is not None and head.weight is table.weight)
    return 0 if tied else table.weight.numel()
