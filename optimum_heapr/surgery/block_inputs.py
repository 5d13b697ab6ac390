# Licensed under the Apache License, Version 2.0
"""What the experts of a layer are called with, routed and shared, collected over micro-batches.

Shared experts are found by what they do, not by name: a gated MLP beside the routed experts, inside the module that adds
both up. Its output may be scaled for each token, as `qwen2_moe` does with a sigmoid of its own. The scale `s` is read off:
with `y` the sum, `e` the routed output and `o` that of the MLP, it is `s = (y - e) . o / (o . o)`, and if `y = e + s o`
does not hold then, the MLP is something else and is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..experts import is_gated_mlp
from .portion import Added, numbers


if TYPE_CHECKING:
    from ..experts import ExpertBlock

# Share of the squares that rounding may leave unexplained; in bfloat16 each number is exact to 2^-9.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Calls:
    """What a block is called with, all of its calls one after another.

    Attributes:
        hidden (`torch.Tensor`): hidden states, [tokens, d].
        index (`torch.Tensor`): experts of each token, [tokens, K].
        weight (`torch.Tensor`): their router weights, [tokens, K].
        shared (`dict[str, tuple]`): by path of a shared expert, what it is given, [tokens, d], and the scale of what it gives,
            [tokens, 1].
    """

    hidden: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor
    shared: dict[str, tuple[torch.Tensor, torch.Tensor]]


class BlockInputs:
    """The calls of one block.

    Args:
        shared (`dict[str, torch.nn.Module]`): by path, the MLPs that may be shared experts; those that turn out to be none
            are taken out.
        keeps (`Collection[str]`): of shared experts, `"activations"` of their neurons, their `"inputs"`, or both.

    Attributes:
        counts (`torch.Tensor`): which tokens of the next call count, bool [tokens].
        rerouted (`Hashable`, *optional*): under which name the routing of the calls from now on is kept, which are the same as
            before but for how tokens are routed in a pruned model.
    """

    def __init__(self, shared: dict[str, torch.nn.Module], keeps: Collection[str] = ("activations",)):
        self.shared = shared
        self.counts: torch.Tensor
        self.rerouted: Hashable | None = None
        self._routing: list[tuple[torch.Tensor, ...]] = []
        self._reroutings: dict[Hashable, list[tuple[torch.Tensor, ...]]] = {}
        self._keeps = keeps
        self._activations: dict[str, list[torch.Tensor]] = {name: [] for name in shared}
        self._inputs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in shared}
        self._call: dict[str, torch.Tensor] = {}

    def routing(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states [tokens, d], experts of each token [tokens, K], and their router weights [tokens, K]."""
        hidden, index, weight = (_joined(parts) for parts in zip(*self._routing))
        self._routing = [(hidden, index, weight)]  # once, not twice
        return hidden, index, weight

    def rerouting(self, name: Hashable) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Experts and weights as of [`routing`], in a pruned model; `None` if its routers are those of the unpruned one."""
        if name not in self._reroutings:
            return None
        index, weight = (torch.cat(parts) for parts in zip(*self._reroutings[name]))
        return index, weight

    def shared_activations(self) -> Iterator[tuple[str, torch.Tensor]]:
        """By path of the shared expert: its activations, scale in, [tokens, I]."""
        for name in self.shared:
            joined = _joined(self._activations[name])
            self._activations[name] = [joined]
            yield name, joined

    def calls(self, rerouting: tuple[torch.Tensor, torch.Tensor] | None = None) -> Calls:
        """All that was collected, with these experts and weights in the place of its own, where given: as of [`rerouting`]."""
        hidden, index, weight = self.routing()
        for name in self.shared:
            self._inputs[name] = [tuple(_joined(parts) for parts in zip(*self._inputs[name]))]
        return Calls(hidden, *(rerouting or (index, weight)), {name: self._inputs[name][0] for name in self.shared})

    def forget(self) -> None:
        """Drops hidden states and routing: of a layer of many tokens they are much, and a fit needs them once."""
        self._routing, self._reroutings = [], {}

    def agree_on_shared(self, added: Added) -> None:
        """Takes out what was no shared expert in the calls of another process."""
        missing = numbers(added, [name not in self.shared for name in self._activations])
        self.shared = {name: self.shared[name] for name, others in zip(self._activations, missing) if not others}

    def only(self, tokens: torch.Tensor) -> BlockInputs:
        """The same calls for some of the tokens, by number; not how they are routed in a pruned model."""
        other = copy.copy(self)
        other._routing = [tuple(part[tokens] for part in self.routing())]
        other._activations = {name: [part[tokens]] for name, part in self.shared_activations()}
        return other

    def hooks(self, model: torch.nn.Module, block: ExpertBlock) -> list:
        """Hooks that collect each call of the block."""
        handles = [block.module.register_forward_pre_hook(self._routed, with_kwargs=True)]
        if self.shared:
            handles.append(block.module.register_forward_hook(self._holds("routed")))
            handles.append(model.get_submodule(_parent(block.path)).register_forward_hook(self._added_up))
        for name, mlp in self.shared.items():
            handles.append(mlp.register_forward_hook(self._holds(name)))
            for part in ("gate_proj", "down_proj"):
                handles.append(getattr(mlp, part).register_forward_pre_hook(self._holds(f"{name}.{part}")))
        return handles

    def _routed(self, module: torch.nn.Module, inputs: tuple, named: dict) -> None:
        inputs = (
            *inputs,
            *(named[name] for name in ("hidden_states", "top_k_index", "top_k_weights") if name in named),
        )
        counts = self.counts = self.counts.to(inputs[0].device)
        hidden, *routing = (tensor.flatten(0, -2)[counts] for tensor in inputs)
        if self.rerouted is None:
            self._routing.append((hidden, *routing))
        else:
            self._reroutings.setdefault(self.rerouted, []).append(tuple(routing))

    def _holds(self, name: str):
        """A hook on what a module returns, or before it on what it is given."""

        def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor | None = None) -> None:
            self._call[name] = (inputs[0] if output is None else output).flatten(0, -2)

        return hook

    def _added_up(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        output = (output[0] if isinstance(output, tuple) else output).flatten(0, -2)
        for name in list(self.shared) if self.rerouted is None else ():
            scale = _scale(output, self._call["routed"], self._call.get(name))
            if scale is None:
                del self.shared[name]
            else:
                self._keep_shared(name, scale.to(output.dtype))
        self._call.clear()

    def _keep_shared(self, name: str, scale: torch.Tensor) -> None:
        if "activations" in self._keeps:
            self._activations[name].append((self._call[f"{name}.down_proj"] * scale)[self.counts])
        if "inputs" in self._keeps:
            self._inputs[name].append((self._call[f"{name}.gate_proj"][self.counts], scale[self.counts]))


@contextmanager
def watched_blocks(
    model: torch.nn.Module, blocks: list[ExpertBlock], keeps: Collection[str] = ("activations",)
) -> Iterator[dict[str, BlockInputs]]:
    """Collects the calls of blocks until it ends, of shared experts what it is to keep; by block path."""
    watched = {block.path: BlockInputs(_gated_mlps_beside(model, block), keeps) for block in blocks}
    handles = [handle for block in blocks for handle in watched[block.path].hooks(model, block)]
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()


def _gated_mlps_beside(model: torch.nn.Module, block: ExpertBlock) -> dict[str, torch.nn.Module]:
    """By path, the MLPs in the module that holds the block. Of several, which each gave what could not be told apart."""
    parent = _parent(block.path)
    found = {
        f"{parent}.{name}": module
        for name, module in model.get_submodule(parent).named_children()
        if is_gated_mlp(module)
    }
    return found if len(found) == 1 else {}


def _scale(total: torch.Tensor, routed: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor | None:
    """What `own` was multiplied with for each token before it was added to `routed`, [tokens, 1]; `None` if it was not."""
    if own is None or own.shape != total.shape or routed.shape != total.shape:
        return None
    total, routed, own = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (total, routed, own))
    added = total - routed
    scale = (added * own).sum(1, keepdim=True) / own.square().sum(1, keepdim=True).clamp(min=1e-30)
    left = (added - scale * own).square().sum()
    return scale if left <= ROUNDING * sum(part.square().sum() for part in (total, routed, own)) else None


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
