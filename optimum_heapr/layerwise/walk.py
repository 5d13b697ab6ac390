# Licensed under the Apache License, Version 2.0
"""Micro-batches on their way through the layers of a model: all of them through one layer, then through the next."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from .decoder import LayerCall, Slot, filled


if TYPE_CHECKING:
    from .activations import ActivationStore
    from .decoder import Decoder


class LayerWalk:
    """
    What goes into each layer for each micro-batch, and how the layer is called besides.

    Args:
        decoder (`Decoder`): the layers.
        batches (`dict[int, dict]`): micro-batches by number, as of [`~CalibrationData.micro_batches`].
        store (`ActivationStore`): where the inputs of layers are kept, by number of the layer and the micro-batch.

    Attributes:
        stream (`str`): what the inputs of layers are called in the store.
    """

    stream = "hidden"

    def __init__(self, decoder: Decoder, batches: dict[int, dict[str, torch.Tensor]], store: ActivationStore):
        self.decoder, self.batches, self.store = decoder, batches, store
        self._calls: dict[int, list[LayerCall]] = {}
        self._arguments: dict[int, list[torch.Tensor | str]] = {}

    def capture(self, numbers: Iterable[int], keep_inputs: bool = True) -> None:
        """Finds what the layers are called with, and stores the input of the first. Weights outside of layers must be there.

        Args:
            numbers (`Iterable[int]`): which micro-batches.
            keep_inputs (`bool`): off if the store has the inputs of a layer already.

        Raises:
            HeaprError: if a layer needs more than the hidden states of the one before.
        """
        same: list[torch.Tensor] = []
        for index in numbers:
            hidden, self._calls[index], tensors = self.decoder.calls(*self.inputs(index))
            if keep_inputs:
                self.store.put(f"{self.stream}.0.{index}", hidden)
            # Positions, and masks where nothing is padded, are those of the first micro-batch: one copy will do.
            same = same or tensors
            self._arguments[index] = []
            for slot, tensor in enumerate(tensors):
                if slot < len(same) and tensor.shape == same[slot].shape and torch.equal(tensor, same[slot]):
                    self._arguments[index].append(same[slot])
                else:
                    self._arguments[index].append(f"argument.{slot}.{index}")
                    self.store.put(f"argument.{slot}.{index}", tensor)

    def branch(self, stream: str, number: int) -> LayerWalk:
        """Another walk through the same layers, which begins with what goes into this layer here, and is then its own."""
        other = copy.copy(self)
        other.stream = stream
        for index in self.batches:
            other.store.put(f"{stream}.{number}.{index}", self.hidden(number, index))
        return other

    def inputs(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask of one micro-batch, [samples, tokens] each."""
        batch, device = self.batches[index], self.decoder.device
        return batch["input_ids"].to(device), batch["attention_mask"].to(device)

    def hidden(self, number: int, index: int) -> torch.Tensor:
        """A copy of what goes into a layer, [samples, tokens, d]."""
        return self.store.get(f"{self.stream}.{number}.{index}", self.decoder.device)

    def call(self, number: int, layer: torch.nn.Module, hidden: torch.Tensor, index: int) -> torch.Tensor:
        """One layer on one micro-batch."""

        def tensor_of(slot: Slot) -> torch.Tensor:
            kept = self._arguments[index][slot.index]
            return kept if isinstance(kept, torch.Tensor) else self.store.get(kept, self.decoder.device)

        call = self._calls[index][number]
        return self.decoder.checked(layer(hidden, *filled(call.args, tensor_of), **filled(call.kwargs, tensor_of)))

    def forward(self, number: int, layer: torch.nn.Module, index: int) -> None:
        """Takes one micro-batch through a layer, and stores what comes out as the input of the next."""
        self.store.put(
            f"{self.stream}.{number + 1}.{index}", self.call(number, layer, self.hidden(number, index), index)
        )

    def drop(self, what: str, number: int) -> None:
        """Forgets what is stored of a layer, for all micro-batches: `hidden`, or what the caller stored like it."""
        for index in self.batches:
            self.store.drop(f"{what}.{number}.{index}")
