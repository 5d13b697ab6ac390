# Licensed under the Apache License, Version 2.0
"""Experts of a pruned model as ordinary linear layers, for tools that know nothing else, and back."""

from __future__ import annotations

import torch
from torch import nn

from ..experts import model_name
from ..modeling.atomic_experts import AtomicExperts
from ..modeling.conversion import expert_names
from ..utils.errors import HeaprError


class LinearExperts(nn.ModuleList):
    """The experts of one layer, each a `nn.ModuleDict` of three `nn.Linear`: gate, up and down, by the family's names.

    Args:
        packed (`AtomicExperts`): what it takes the place of. Gate and up weights are shared, not copied; down projections, which it
            stores the other way, are (saving refuses transposed views).
        names (`tuple[str, str, str]`): of gate, up and down projection.
    """

    def __init__(self, packed: AtomicExperts, names: tuple[str, str, str]):
        super().__init__()
        widths = [packed.widths[expert] for expert in packed.order]
        pairs, downs = packed.gate_up_proj.split([2 * width for width in widths]), packed.down_proj.split(widths)
        made: list[nn.Module | None] = [None] * packed.num_experts
        for expert, pair, down in zip(packed.order, pairs, downs):
            gate, up = pair.chunk(2) if packed.is_concatenated else (pair[::2], pair[1::2])
            made[expert] = nn.ModuleDict(
                {name: _linear(weight, packed) for name, weight in zip(names, (gate, up, down.T), strict=True)}
            )
        self.extend(made)
        self.names, self.training = names, packed.training
        self.hidden_size, self.has_bias = packed.down_proj.shape[-1], packed.has_bias
        del packed.gate_up_proj, packed.down_proj
        self.__dict__["packed"] = (
            packed  # for its gate function and widths; no child, or it would be listed as an expert
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `AtomicExperts.forward`: one expert after another."""
        experts, permutation = torch.sort(top_k_index.reshape(-1), stable=True)
        counts = torch.bincount(experts, minlength=len(self)).tolist()
        tokens = (permutation // top_k_index.shape[-1]).split(counts)
        weights = top_k_weights.reshape(-1, 1)[permutation].split(counts)
        output = torch.zeros_like(hidden_states)
        for expert, own, weight, width in zip(self, tokens, weights, self.packed.widths):
            if len(own) and width:
                gate, up, down = (expert[name] for name in self.names)
                rows = hidden_states[own]
                parts = (gate(rows), up(rows))
                gate_up = torch.cat(parts, -1) if self.packed.is_concatenated else torch.stack(parts, -1).flatten(-2)
                output.index_add_(0, own, down(self.packed.weighted_activation(gate_up, weight)).to(output.dtype))
        return output

    @torch.no_grad()
    def to_packed(self) -> AtomicExperts:
        """The module that it was made from, with the weights as they are now.

        Raises:
            HeaprError: if a layer is not a plain linear one any more.
        """
        packed, layers = self.packed, [[expert[name] for name in self.names] for expert in self]
        for layer in (layer for expert in layers for layer in expert):
            if type(layer) is not nn.Linear:
                raise HeaprError(
                    f"experts: hold a {type(layer).__name__}, which cannot be packed; merge adapters first, and keep quantized "
                    "models as they are"
                )
        (first, _, _), *_ = layers
        trained = first.weight.requires_grad
        total = sum(packed.widths)
        gate_up = first.weight.new_empty(2 * total, first.in_features)
        down = first.weight.new_empty(total, first.in_features)
        start = 0
        for expert in packed.order:
            width, (gate, up, back) = packed.widths[expert], (layer.weight for layer in layers[expert])
            pair = gate_up[2 * start : 2 * (start + width)]
            gates, ups = pair.chunk(2) if packed.is_concatenated else (pair[::2], pair[1::2])
            if width:
                gates.copy_(gate), ups.copy_(up)
            down[start : start + width] = back.T
            start += width
        packed.gate_up_proj = nn.Parameter(gate_up, requires_grad=trained)
        packed.down_proj = nn.Parameter(down, requires_grad=trained)
        packed.train(self.training)
        return packed


def _linear(weight: torch.Tensor, packed: AtomicExperts) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False, device="meta")  # an initialisation of nothing would be warned of
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=packed.gate_up_proj.requires_grad)
    return layer


def to_linear_experts(model: nn.Module) -> nn.Module:
    """Makes the experts of a pruned model ordinary linear layers, in place: `…experts.3.gate_proj` and so on.

    Quantizers and adapters that look for `nn.Linear` then find them. Of the weights only down projections are copied, a layer at
    a time; the model computes the same, expert after expert, and saves under the same names.

    Args:
        model (`PreTrainedModel`): a pruned model of layout `variable`.

    Returns:
        `PreTrainedModel`: the same object.

    Raises:
        HeaprError: if there are no packed experts, or they have biases.
    """
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, AtomicExperts)}
    if not blocks:
        raise HeaprError(
            f"model={model_name(model)!r}: has no experts of variable widths; prune with layout='variable', or load what was"
        )
    for path, block in blocks.items():
        if block.has_bias:
            raise HeaprError(
                f"model={model_name(model)!r}: {path} has biases, which checkpoints keep for all experts together; such experts "
                "stay packed"
            )
    for path, block in blocks.items():
        model.set_submodule(path, LinearExperts(block, expert_names(model.config.model_type)))
    return model


def from_linear_experts(model: nn.Module) -> nn.Module:
    """The inverse of [`to_linear_experts`], in place, a layer at a time.

    Raises:
        HeaprError: if a layer was quantized or carries an adapter.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, LinearExperts):
            model.set_submodule(path, module.to_packed())
    return model
