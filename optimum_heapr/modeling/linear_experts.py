# Licensed under the Apache License, Version 2.0
"""Experts as ordinary linear layers, for tools that know nothing else. This file travels with pruned checkpoints."""

import torch
from torch import nn

from .atomic_experts import AtomicExperts


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
        self.names, self.num_experts, self.training = names, packed.num_experts, packed.training
        self.hidden_size, self.has_bias = packed.down_proj.shape[-1], packed.has_bias
        del packed.gate_up_proj, packed.down_proj
        # For its gate function and widths; no child, or it would be listed as an expert.
        self.__dict__["packed"] = packed

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `AtomicExperts.forward`: one expert after another."""
        if torch.compiler.is_exporting():
            return self._for_all_tokens(hidden_states, top_k_index, top_k_weights)
        experts, permutation = torch.sort(top_k_index.reshape(-1), stable=True)
        counts = torch.bincount(experts, minlength=len(self)).tolist()
        tokens = (permutation // top_k_index.shape[-1]).split(counts)
        weights = top_k_weights.reshape(-1, 1)[permutation].split(counts)
        output = torch.zeros_like(hidden_states)
        for expert, own, weight, width in zip(self, tokens, weights, self.packed.widths):
            if len(own) and width:
                output.index_add_(0, own, self._of_one(expert, hidden_states[own], weight).to(output.dtype))
        return output

    def _for_all_tokens(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """For programs, which do not know how many tokens an expert gets: every expert computes all of them, and those that did not
        choose it weigh 0. What it overflows for among these is left out. Ordinary operations alone, for runtimes that have no others."""
        output = torch.zeros_like(hidden_states)
        for number, (expert, width) in enumerate(zip(self, self.packed.widths)):
            if width:
                weight = torch.where(top_k_index == number, top_k_weights, 0).sum(-1, keepdim=True)
                given = self._of_one(expert, hidden_states, weight).to(output.dtype)
                output = output + torch.where(weight != 0, given, 0)
        return output

    def _of_one(self, expert: nn.ModuleDict, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """rows [tokens, d], weight [tokens, 1] -> what the expert gives them, [tokens, d]."""
        gate, up, down = (expert[name] for name in self.names)
        parts = (gate(rows), up(rows))
        gate_up = torch.cat(parts, -1) if self.packed.is_concatenated else torch.stack(parts, -1).flatten(-2)
        return down(self.packed.weighted_activation(gate_up, weight))

    def layers(self) -> list[list[nn.Linear]]:
        """Gate, up and down of each expert."""
        return [[expert[name] for name in self.names] for expert in self]

    @torch.no_grad()
    def to_packed(self) -> AtomicExperts:
        """The module that it was made from, with the weights as they are now; all layers must be plain linear ones still."""
        packed, layers = self.packed, self.layers()
        (first, _, _), *_ = layers
        trained = first.weight.requires_grad
        total = sum(packed.widths)
        gate_up = first.weight.new_empty(2 * total, self.hidden_size)
        down = first.weight.new_empty(total, self.hidden_size)
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
