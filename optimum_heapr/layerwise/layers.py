# Licensed under the Apache License, Version 2.0
"""A model of which one decoder layer at a time is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..fingerprint import sampled_values
from .decoder import Decoder
from .source import not_streamable


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .source import SourceCheckpoint


class StreamedModel(Decoder):
    """
    A model without storage, whose weights are brought in for a layer, or for all that is not a layer, and dropped again.

    Args:
        model (`PreTrainedModel`): on the meta device, from [`~optimum_heapr.checkpoints.skeleton.load_skeleton`].
        source (`SourceCheckpoint`): its weights.
        device (`torch.device`): where they are brought to.

    Attributes:
        samples (`dict[str, bytes]`): by parameter, the values that identify the model, of all that was loaded so far.

    Raises:
        HeaprError: if the routed experts are not in one list of layers, or the checkpoint lacks weights.
    """

    def __init__(self, model: PreTrainedModel, source: SourceCheckpoint, device: torch.device):
        super().__init__(model, source.blocks)
        self.source, self._device = source, device
        self.samples: dict[str, bytes] = {}
        self._stored_as = self._names_in_checkpoint()

    @property
    def device(self) -> torch.device:
        """Where weights are brought to."""
        return self._device

    @contextmanager
    def layer(self, index: int, then: int | None = None) -> Iterator[torch.nn.Module]:
        layer = self.layers[index]
        with self._loaded(layer.named_modules(prefix=f"{self.path}.{index}")):
            if then is not None:
                within = f"{self.path}.{then}."
                self.source.read_ahead({stored for name, stored in self._stored_as.items() if name.startswith(within)})
            yield layer

    @contextmanager
    def rest(self) -> Iterator[None]:
        with self._loaded(self.outside()):
            yield

    def _names_in_checkpoint(self) -> dict[str, str]:
        """By name of a parameter or buffer: the name it is stored under, which for tied ones is that of another."""
        names: dict[int, list[str]] = {}
        parts = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in parts:
            if name in self.source.empty:
                names.setdefault(id(tensor), []).append(name)
        stored_as = {}
        for same in names.values():
            stored = next((name for name in same if name in self.source.stored), None)
            if stored is None:
                raise not_streamable(self.model, f"the checkpoint has no {same[0]}")
            stored_as |= dict.fromkeys(same, stored)
        return stored_as

    @contextmanager
    def _loaded(self, modules: Iterable[tuple[str, torch.nn.Module]]) -> Iterator[None]:
        """Weights and buffers of these modules are in memory until the block ends; not those of modules in them."""
        before, made = [], {}
        try:
            for path, module in modules:
                before.append((module, dict(module._parameters), dict(module._buffers)))
                self._make_buffers(module)
                for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                    full_name = f"{path}.{name}" if path else name
                    if full_name not in self._stored_as or tensor is None:
                        continue
                    stored = self._stored_as[full_name]
                    if stored not in made:
                        made[stored] = self._read(stored)
                    if name in module._parameters:
                        module._parameters[name] = torch.nn.Parameter(made[stored], requires_grad=False)
                    else:
                        module._buffers[name] = made[stored]
            yield
        finally:
            for module, parameters, buffers in before:
                module._parameters.update(parameters)
                module._buffers.update(buffers)

    def _read(self, stored: str) -> torch.Tensor:
        tensor = self.source.load(stored, self.device)
        self.samples[stored] = sampled_values(tensor)
        return tensor

    def _make_buffers(self, module: torch.nn.Module) -> None:
        """Computes the buffers that no checkpoint holds, such as rotary frequencies, as loading a model does."""
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=self.device)
        if names:
            self.model._init_weights(module)

    def all_samples(self, experts: bool = True) -> Iterator[bytes]:
        """Of each parameter, in the order of the model, the values that identify it; reads what was not loaded before.

        Args:
            experts (`bool`): also of routed experts, which are most of what there is to read.
        """
        of_experts = tuple(f"{block.path}." for block in self.source.blocks)
        for name, _ in self.model.named_parameters():
            stored = self._stored_as[name]
            if not experts and stored.startswith(of_experts):
                continue
            if stored not in self.samples:
                self.samples[stored] = sampled_values(self.source.parameter(stored))
            yield self.samples[stored]


class _WithoutWeights(StreamedModel):
    """One zero in place of all numbers of a weight."""

    def _read(self, stored: str) -> torch.Tensor:
        zero = torch.zeros(1, dtype=self.source.dtypes[stored], device=self.device)
        return zero.expand(self.source.empty[stored].shape)


def check_layers(model: PreTrainedModel, source: SourceCheckpoint) -> None:
    """Refuses a model that cannot be calibrated layer by layer, without reading its weights.

    Args:
        model (`PreTrainedModel`): without storage.
        source (`SourceCheckpoint`): its checkpoint.

    Raises:
        HeaprError: naming the reason.
    """
    probe = _WithoutWeights(model, source, torch.device("cpu"))
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with probe.rest():
        probe.calls(ids, torch.ones_like(ids))
