# Licensed under the Apache License, Version 2.0
"""Experts of different widths in one module. This file travels with pruned checkpoints.

An atomic expert is three rows: its row of the gate projection, its row of the up projection, and its column of the down
projection, which is stored as a row. An expert is then a contiguous view, and pruning is a selection of rows.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from .compiled import traced_forward
from .half_precision import (
    half_precision_forward,
    is_half_precision_inference,
    lacks_products,
    wants_gradient,
    width_step,
)
from .operations import grouped_product, linear, product, product_dtype


PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")

# What accelerate hangs on a module that it has placed on a device; it holds the stock module itself.
HOOK_ATTRIBUTES = ("forward", "_old_forward", "_hf_hook")


# Tokens that the loop gathers at once. Few: what is gathered should still be in the cache when it is used. Not too few: a
# scatter has a fixed cost.
ROWS_AT_ONCE = 1024


def storage_order(widths: list[int]) -> list[int]:
    """Experts in the order in which `AtomicExperts` stores them: from wide to narrow, equal ones by number.

    Experts of one width are then neighbours, and a view of them is a stack of equal matrices.
    """
    return sorted(range(len(widths)), key=lambda expert: -widths[expert])


class AtomicExperts(nn.Module):
    """The experts of one layer, expert e with `widths[e]` atomic experts; a width of 0 is legal.

    It takes over the place, the attributes and the gate function of the stock module that it is made from. With W the
    sum of the widths, d the hidden size, E the number of experts, and experts in `storage_order`, it holds

    - `gate_up_proj` [2 W, d]: for each expert its gate rows and then its up rows, or, where the stock module interleaves
      them, one gate and one up row for each atomic expert in turn;
    - `down_proj` [W, d]: row k is column k of the expert's down projection;
    - `gate_up_proj_bias` [2 W] and `down_proj_bias` [E, d] (by expert number) where the family has biases. An expert of
      width 0 keeps the latter: it does not depend on the atomic experts.

    Args:
        stock (`nn.Module`): experts module of the unpruned model; its weights are not read.
        widths (`list[int]`): atomic experts of each expert.
    """

    def __init__(self, stock: nn.Module, widths: list[int]):
        super().__init__()
        own = {*self.__dict__, *HOOK_ATTRIBUTES}
        self.__dict__.update({name: value for name, value in stock.__dict__.items() if name not in own})
        for name, child in stock.named_children():  # the activation function
            self.add_module(name, child)
        self.training = stock.training
        self.stock_class = type(stock)
        self.num_experts = len(widths)
        self.widths = list(widths)
        self.order = storage_order(widths)
        # The inverse of `order`, made on the device of the first call.
        self._slot_of_expert: torch.Tensor | None = None

        hidden_size, stock_width = stock.down_proj.shape[1:][:: -1 if stock.is_transposed else 1]
        total = sum(widths)
        self.width_step = width_step(stock_width)
        options = {"device": stock.down_proj.device, "dtype": stock.down_proj.dtype}
        self.gate_up_proj = nn.Parameter(torch.empty(2 * total, hidden_size, **options))
        self.down_proj = nn.Parameter(torch.empty(total, hidden_size, **options))
        if stock.has_bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(2 * total, **options))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, hidden_size, **options))

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, widths={min(self.widths)}..{max(self.widths)}, total={sum(self.widths)}"

    def weights(self) -> list[torch.Tensor]:
        """What the block computes with, in the order of `PARAMETERS`: mostly its parameters, but an adapter may add to them, and
        a quantizer keep them in another form."""
        stored = PARAMETERS if self.has_bias else PARAMETERS[:2]
        computed = getattr(self, "parametrizations", {}) if torch.compiler.is_compiling() else {}
        # Not by the attribute: a graph that looks into torch's cache of them is not valid for the next call.
        return [computed[name]() if name in computed else getattr(self, name) for name in stored]

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.stock_class._apply_gate(self, gate_up)

    def weighted_activation(self, gate_up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """gate_up [n, 2 width], router weight [n, 1] of any dtype -> [n, width].

        The weight goes to the activation, which is narrower than the output that it would scale.
        """
        activation = self._apply_gate(gate_up) if gate_up.shape[1] else gate_up
        return (activation * weight).to(gate_up.dtype)

    def slots_of(self, experts: torch.Tensor) -> torch.Tensor:
        """Where experts are stored, by number."""
        if self._slot_of_expert is None or self._slot_of_expert.device != experts.device:
            self._slot_of_expert = torch.tensor(self.order, device=experts.device).argsort()
        return self._slot_of_expert[experts]

    def sorted_by_slot(
        self, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Tokens [tokens K] and router weights [tokens K, 1] sorted by where their expert is stored, and each slot's share."""
        slots, permutation = torch.sort(self.slots_of(top_k_index).reshape(-1), stable=True)
        counts = torch.bincount(slots, minlength=self.num_experts).tolist()
        return permutation // top_k_index.shape[-1], top_k_weights.reshape(-1, 1)[permutation], counts

    def groups(self) -> Iterator[tuple[int, int, int]]:
        """Runs of slots of equal width: (first slot, slots, width)."""
        first = 0
        for width, run in itertools.groupby(self.order, key=self.widths.__getitem__):
            slots = len(list(run))
            yield first, slots, width
            first += slots

    def runs(self, counts: list[int], split: bool = False) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
        """Slots that have tokens, in order, together while they have no more than `ROWS_AT_ONCE`.

        Each run comes as its part of the sorted tokens and its (slot, tokens). Experts that give nothing are left out.

        Args:
            counts (`list[int]`): tokens of each slot.
            split (`bool`): whether a slot with more tokens comes in several parts.
        """
        if not self.has_bias:
            counts = counts[: sum(width > 0 for width in self.widths)]  # empty experts are stored last
        start, run = 0, []
        for slot, left in enumerate(counts):
            while left:
                count = min(left, ROWS_AT_ONCE) if split else left
                rows = sum(others for _, others in run)
                if run and rows + count > ROWS_AT_ONCE:
                    yield slice(start, start + rows), run
                    start, run = start + rows, []
                run.append((slot, count))
                left -= count
        if run:
            yield slice(start, start + sum(count for _, count in run)), run

    def add_partial(
        self,
        output: torch.Tensor,
        partial: torch.Tensor,
        run: list[tuple[int, int]],
        tokens: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """Adds what a run's experts give, and their biases, to the output of the run's tokens."""
        if self.has_bias:
            experts = _repeat([self.order[slot] for slot, _ in run], [count for _, count in run], tokens.device)
            partial = partial + weights * self.down_proj_bias[experts]
        output.index_add_(0, tokens, partial.to(output.dtype))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As the stock module: [tokens, d], [tokens, K], [tokens, K] -> [tokens, d]."""
        if torch.compiler.is_compiling():
            return traced_forward(self, hidden_states, top_k_index, top_k_weights)
        name = self.config._experts_implementation
        # The device first: a quantizer restores weights for whoever looks at them.
        on_cpu = hidden_states.device.type == "cpu"
        if on_cpu and lacks_products(weight := self.weights()[0], product_dtype(weight)):
            # What is converted is not to be kept for the gradients. Without them autocast lowers the experts that are used, not all.
            if wants_gradient(self, hidden_states, top_k_weights):
                return traced_forward(self, hidden_states, top_k_index, top_k_weights)
            name = "eager"
        implementation = ATOMIC_EXPERTS_FUNCTIONS.get_interface(name, eager_atomic_experts_forward)
        return implementation(self, hidden_states, top_k_index, top_k_weights)


def eager_atomic_experts_forward(
    self: AtomicExperts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """One expert after another, each on its own tokens; those with few tokens share a gather and a scatter."""
    if is_half_precision_inference(self, hidden_states, top_k_weights):
        return half_precision_forward(self, hidden_states, top_k_index, top_k_weights)
    tokens, weights, counts = self.sorted_by_slot(top_k_index, top_k_weights)
    widths = [self.widths[expert] for expert in self.order]
    gate_up_weights = self.gate_up_proj.split([2 * width for width in widths])
    down_weights = self.down_proj.split(widths)
    gate_up_biases = self.gate_up_proj_bias.split([2 * width for width in widths]) if self.has_bias else None

    output = torch.zeros_like(hidden_states)
    for own, run in self.runs(counts):
        parts = [count for _, count in run]
        partials = []
        all_rows = hidden_states.index_select(0, tokens[own])
        for (slot, _), rows, weight in zip(run, all_rows.split(parts), weights[own].split(parts)):
            gate_up = linear(rows, gate_up_weights[slot], gate_up_biases[slot] if self.has_bias else None)
            partials.append(product(self.weighted_activation(gate_up, weight), down_weights[slot]))
        partial = partials[0] if len(partials) == 1 else torch.cat(partials)
        self.add_partial(output, partial, run, tokens[own], weights[own])
    return output


def grouped_mm_atomic_experts_forward(
    self: AtomicExperts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts of equal width together, in one grouped matrix product over views of the packed weights.

    A good `width_multiple` leaves few distinct widths, so few products.
    """
    if is_half_precision_inference(self, hidden_states, top_k_weights):
        return half_precision_forward(self, hidden_states, top_k_index, top_k_weights)
    tokens, weights, counts = self.sorted_by_slot(top_k_index, top_k_weights)
    output = torch.zeros_like(hidden_states)
    row, start = 0, 0
    for first, slots, width in self.groups():
        group_counts = counts[first : first + slots]
        rows, atoms = sum(group_counts), slots * width
        own, weight = tokens[row : row + rows], weights[row : row + rows]
        slice_of_atoms = slice(start, start + atoms)
        slice_of_pairs = slice(2 * start, 2 * (start + atoms))
        row, start = row + rows, start + atoms
        if rows == 0:
            continue
        slot_of_row = _repeat(range(slots), group_counts, own.device) if self.has_bias else None
        if width:
            offsets = torch.tensor(group_counts, device=own.device).cumsum(0).to(torch.int32)
            gate_up_weight = self.gate_up_proj[slice_of_pairs].view(slots, 2 * width, -1)
            gate_up = grouped_product(
                hidden_states.index_select(0, own), gate_up_weight.transpose(1, 2), offsets, group_counts
            )
            if self.has_bias:
                gate_up = gate_up + self.gate_up_proj_bias[slice_of_pairs].view(slots, 2 * width)[slot_of_row]
            down_weight = self.down_proj[slice_of_atoms].view(slots, width, -1)
            partial = grouped_product(self.weighted_activation(gate_up, weight), down_weight, offsets, group_counts)
            output.index_add_(0, own, partial.to(output.dtype))
        if self.has_bias:
            experts = torch.tensor(self.order[first : first + slots], device=own.device)[slot_of_row]
            output.index_add_(0, own, (weight * self.down_proj_bias[experts]).to(output.dtype))
    return output


def _repeat(values, counts: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(list(values), device=device).repeat_interleave(torch.tensor(counts, device=device))


class AtomicExpertsInterface(ExpertsInterface):
    """Implementations for `AtomicExperts`, under the names that users know from stock models."""

    _global_mapping = {
        "grouped_mm": grouped_mm_atomic_experts_forward,
        "batched_mm": eager_atomic_experts_forward,
    }


ATOMIC_EXPERTS_FUNCTIONS = AtomicExpertsInterface()
