# Licensed under the Apache License, Version 2.0
"""The decoder layers of a model: where they are, what each is called with, and the model around them.

Nothing is known here about families. The model's own forward is run with its decoder layers replaced by stand-ins that
return what they are given: that shows the arguments of each layer, which depend on positions and padding but not on
hidden states, and later carries a given last hidden state through the final norm and the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..experts import ExpertBlock, model_name
from ..utils.errors import HeaprError


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class LayerCall:
    """What a decoder layer is called with besides hidden states. Tensors are `Slot`s into those of the whole forward."""

    args: tuple
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Slot:
    """The place of a tensor among those that a forward hands to its layers."""

    index: int


class Decoder:
    """
    The decoder layers of a model whose weights need not be there.

    Args:
        model (`PreTrainedModel`): its modules.
        blocks (`list[ExpertBlock]`): its expert blocks.

    Attributes:
        path (`str`): module path of the list of layers.
        layers (`torch.nn.ModuleList`): the decoder layers.
        blocks (`list[ExpertBlock]`): its expert blocks.
        first (`int`): the first layer with routed experts; nothing below it needs a backward.

    Raises:
        HeaprError: if the routed experts are not in one list of layers.
    """

    def __init__(self, model: PreTrainedModel, blocks: list[ExpertBlock]):
        self.model, self.blocks = model, blocks
        self.path, self.layers = decoder_layers(model, blocks)
        self._blocks = [
            [block for block in blocks if block.path.startswith(f"{self.path}.{index}.")]
            for index in range(len(self.layers))
        ]
        self.first = next(index for index, found in enumerate(self._blocks) if found)

    def blocks_of(self, index: int) -> list[ExpertBlock]:
        """Expert blocks of one layer."""
        return self._blocks[index]

    @property
    def device(self) -> torch.device:
        """Where the layers compute, or the first of them if accelerate has spread them; its hooks then bring inputs along."""
        return self.model.get_input_embeddings().weight.device

    @contextmanager
    def layer(self, index: int, then: int | None = None) -> Iterator[torch.nn.Module]:
        """Yields a decoder layer with its weights in memory.

        Args:
            index (`int`): of the layer.
            then (`int`, *optional*): of the one that comes next, if there is such a one: its weights may be read meanwhile.
        """
        yield self.layers[index]

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Until the block ends, all weights are in memory that are not those of decoder layers: embeddings, norms, head."""
        yield

    def outside(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """All modules that are not in a layer, with their paths: embeddings, norms, head."""
        inside = {id(module) for module in self.layers.modules()}
        return (entry for entry in self.model.named_modules() if id(entry[1]) not in inside)

    def calls(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, list[LayerCall], list[torch.Tensor]]:
        """The input of the first layer, what each layer is called with, and the tensors that the calls refer to.

        The weights outside of layers must be there.

        Args:
            ids (`torch.Tensor`): [samples, tokens].
            mask (`torch.Tensor`): [samples, tokens].

        Raises:
            HeaprError: if a layer needs more than the hidden states of the one before.
        """
        found: list[LayerCall] = []
        hidden_states: list[torch.Tensor] = []
        tensors: dict[int, tuple[Slot, torch.Tensor]] = {}

        def stand_in(index: int) -> Callable:
            def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                if index != len(found):
                    raise self._refusal(f"layer {index} is called in place of layer {len(found)}")
                if hidden_states and hidden is not hidden_states[0]:
                    raise self._refusal(f"what layer {index} is given is not what layer {index - 1} returns")
                hidden_states.append(hidden)
                slotted = {name: self._slotted(value, name, tensors) for name, value in kwargs.items()}
                positional = tuple(self._slotted(value, f"argument {n}", tensors) for n, value in enumerate(args, 1))
                found.append(LayerCall(positional, slotted))
                return hidden

            return forward

        with replaced_forwards(self.layers, stand_in), torch.enable_grad(), self._marked_embeddings():
            try:
                self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            except HeaprError:
                raise
            except (TypeError, ValueError, IndexError) as error:  # its layers return something else
                raise self._refusal("its layers hand on more than hidden states") from error
        if len(found) != len(self.layers):
            raise self._refusal(f"{len(found)} of {len(self.layers)} layers are called")
        return hidden_states[0].detach(), found, [tensor for _, tensor in tensors.values()]

    @contextmanager
    def _marked_embeddings(self) -> Iterator[None]:
        """What is made of embeddings requires a gradient, and tells itself apart from positions and masks."""
        handle = self.model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.detach().requires_grad_(True).clone()
        )
        try:
            yield
        finally:
            handle.remove()

    def _slotted(self, value: Any, name: str, tensors: dict[int, tuple[Slot, torch.Tensor]]) -> Any:
        """An argument with its tensors replaced by their slots."""
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise self._refusal(f"{name!r} is made of hidden states of layers before")
        if isinstance(value, torch.Tensor):
            return tensors.setdefault(id(value), (Slot(len(tensors)), value))[0]
        if isinstance(value, (tuple, list)) and value:
            return type(value)(self._slotted(part, name, tensors) for part in value)
        if isinstance(value, dict) and value:
            return {key: self._slotted(part, name, tensors) for key, part in value.items()}
        if value is None or value == () or isinstance(value, (bool, int, float, str, torch.dtype)):
            return value
        # An empty container, or an object of its own, is where one layer leaves something for another.
        raise self._refusal(f"its layers share {name!r}, a {type(value).__name__}")

    def checked(self, output: Any) -> torch.Tensor:
        """The output of a layer.

        Raises:
            HeaprError: if it is more than hidden states.
        """
        if not isinstance(output, torch.Tensor):
            raise self._refusal(f"its layers hand on more than hidden states, a {type(output).__name__}")
        return output

    def logits(self, ids: torch.Tensor, mask: torch.Tensor, last_hidden: torch.Tensor) -> torch.Tensor:
        """What the model makes of the output of its last layer, [samples, tokens, vocabulary]."""
        last = len(self.layers) - 1
        # If anything read the output of another layer, the backward would reach these.
        self._others = torch.zeros(last, dtype=last_hidden.dtype, device=last_hidden.device, requires_grad=True)

        def stand_in(index: int) -> Callable:
            if index == last:
                return lambda hidden, *args, **kwargs: last_hidden
            return lambda hidden, *args, **kwargs: self._others[index].expand_as(hidden)

        with replaced_forwards(self.layers, stand_in):
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def check_others_unused(self) -> None:
        """Refuses a model whose logits depend on outputs of other layers than the last; after their backward.

        Raises:
            HeaprError: naming the model.
        """
        if self._others.grad is not None:
            raise self._refusal("its logits depend on the outputs of other layers than the last")

    def _refusal(self, reason: str) -> HeaprError:
        return HeaprError(
            f"model={model_name(self.model)!r} (model_type {self.model.config.model_type!r}): cannot be calibrated layer by "
            f"layer: {reason}; use memory='offload' or memory='plain'"
        )


def decoder_layers(model: PreTrainedModel, blocks: list[ExpertBlock]) -> tuple[str, torch.nn.ModuleList]:
    """The list of decoder layers that holds all expert blocks, and its module path.

    Raises:
        HeaprError: if there is no such list.
    """
    found = {}
    for block in blocks:
        parts = block.path.split(".")
        paths = [".".join(parts[:length]) for length in range(1, len(parts))]
        lists = [path for path in paths if isinstance(model.get_submodule(path), torch.nn.ModuleList)]
        found[lists[0] if lists else None] = None
    if len(found) != 1 or None in found:
        where = ", ".join(str(path) for path in found)
        raise HeaprError(
            f"model={model_name(model)!r}: cannot be calibrated layer by layer: its experts are not in one list of layers "
            f"({where}); use memory='offload' or memory='plain'"
        )
    (path,) = found
    return path, model.get_submodule(path)


@contextmanager
def replaced_forwards(layers: Iterable[torch.nn.Module], forward_of: Callable[[int], Callable]) -> Iterator[None]:
    """Until the block ends, layer `i` does what `forward_of(i)` does."""
    layers = list(layers)
    before = [layer.__dict__.get("forward") for layer in layers]  # that of a hook of accelerate
    try:
        for index, layer in enumerate(layers):
            layer.forward = _with_hidden_states(forward_of(index))
        yield
    finally:
        for layer, forward in zip(layers, before):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _with_hidden_states(forward: Callable) -> Callable:
    """Takes the hidden states as the first argument or by name."""

    def called(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not args:
            args = (kwargs.pop("hidden_states"),)
        return forward(*args, **kwargs)

    return called


def filled(value: Any, tensor_of: Callable[[Slot], torch.Tensor]) -> Any:
    """An argument of a [`LayerCall`] with tensors in place of slots."""
    if isinstance(value, Slot):
        return tensor_of(value)
    if isinstance(value, (tuple, list)):
        return type(value)(filled(part, tensor_of) for part in value)
    if isinstance(value, dict):
        return {key: filled(part, tensor_of) for key, part in value.items()}
    return value
