# Licensed under the Apache License, Version 2.0
"""Experts of different widths in one module. This file travels with pruned checkpoints.

An atomic expert is three rows: its row of the gate projection, its row of the up projection, and its column of the down
projection, which is stored as a row. An expert is then a contiguous view, and pruning is a selection of rows.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ExpertsInterface


class AtomicExperts(nn.Module):
    """The experts of one layer, expert e with `widths[e]` atomic experts; a width of 0 is legal.

    It takes over the place, the attributes and the gate function of the stock module that it is made from. With W the
    sum of the widths, d the hidden size and E the number of experts it holds

    - `gate_up_proj` [2 W, d]: for each expert its gate rows and then its up rows, or, where the stock module interleaves
      them, one gate and one up row for each atomic expert in turn;
    - `down_proj` [W, d]: row k is column k of the expert's down projection;
    - `gate_up_proj_bias` [2 W] and `down_proj_bias` [E, d] where the family has biases. An expert of width 0 keeps the
      latter: it does not depend on the atomic experts.

    Args:
        stock (`nn.Module`): experts module of the unpruned model; its weights are not read.
        widths (`list[int]`): atomic experts of each expert.
    """

    def __init__(self, stock: nn.Module, widths: list[int]):
        super().__init__()
        own = set(self.__dict__)
        self.__dict__.update({name: value for name, value in stock.__dict__.items() if name not in own})
        for name, child in stock.named_children():  # the activation function
            self.add_module(name, child)
        self.training = stock.training
        self.stock_class = type(stock)
        self.num_experts = len(widths)
        self.widths = list(widths)

        total, hidden_size = sum(widths), stock.down_proj.shape[2 if stock.is_transposed else 1]
        options = {"device": stock.down_proj.device, "dtype": stock.down_proj.dtype}
        self.gate_up_proj = nn.Parameter(torch.empty(2 * total, hidden_size, **options))
        self.down_proj = nn.Parameter(torch.empty(total, hidden_size, **options))
        if stock.has_bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(2 * total, **options))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, hidden_size, **options))

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, widths={min(self.widths)}..{max(self.widths)}, total={sum(self.widths)}"

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.stock_class._apply_gate(self, gate_up)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As the stock module: [tokens, d], [tokens, K], [tokens, K] -> [tokens, d]."""
        implementation = ATOMIC_EXPERTS_FUNCTIONS.get_interface(
            self.config._experts_implementation, eager_atomic_experts_forward
        )
        return implementation(self, hidden_states, top_k_index, top_k_weights)


def eager_atomic_experts_forward(
    self: AtomicExperts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """One expert after another, each on its own tokens."""
    top_k = top_k_index.shape[-1]
    expert_of_row, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(expert_of_row, minlength=self.num_experts).tolist()
    gate_up_weights = self.gate_up_proj.split([2 * width for width in self.widths])
    down_weights = self.down_proj.split(self.widths)
    gate_up_biases = self.gate_up_proj_bias.split([2 * width for width in self.widths]) if self.has_bias else None

    outputs = []
    for expert, rows in enumerate(hidden_states[order // top_k].split(counts)):
        if counts[expert] == 0:
            continue
        if self.widths[expert] == 0:
            output = torch.zeros_like(rows)
        else:
            bias = gate_up_biases[expert] if self.has_bias else None
            output = self._apply_gate(F.linear(rows, gate_up_weights[expert], bias)) @ down_weights[expert]
        outputs.append(output + self.down_proj_bias[expert] if self.has_bias else output)

    weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return weighted[inverse].view(-1, top_k, weighted.shape[-1]).sum(1).to(hidden_states.dtype)


class AtomicExpertsInterface(ExpertsInterface):
    """Implementations for `AtomicExperts`, under the names that users know from stock models."""

    _global_mapping = {
        "grouped_mm": eager_atomic_experts_forward,
        "batched_mm": eager_atomic_experts_forward,
    }


ATOMIC_EXPERTS_FUNCTIONS = AtomicExpertsInterface()
