# Licensed under the Apache License, Version 2.0
"""The routers of an unpruned model as the pruned one has them, for a while: without the experts that a plan drops.

Nothing is known here about how a family routes. Its own routers run, with the rows of dropped experts taken out and every size
that depends on the number of experts as the smaller model has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..sizing import build, experts_config, find_routing


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..experts import ExpertBlock
    from ..planning.plan import PruningPlan


class Rerouting:
    """
    Args:
        model (`PreTrainedModel`): unpruned; its weights need not be there yet.
        blocks (`list[ExpertBlock]`): its expert blocks.
        routed (`dict[str, list[int]]`): experts that stay in the router, by block path, of each block as many.
    """

    def __init__(self, model: PreTrainedModel, blocks: list[ExpertBlock], routed: dict[str, list[int]]):
        self._model, self._blocks, self._routed = model, blocks, routed
        self._routing, self._count = find_routing(model, blocks), len(routed[blocks[0].path])
        skeleton = build(model, blocks, {self._routing.field: self._count})
        own = {block.path for block in blocks}
        self._sizes: list[tuple[torch.nn.Module, str, int]] = []
        for path, module in skeleton.named_modules():
            here = model.get_submodule(path)
            for name, value in vars(module).items() if path not in own else ():
                if type(value) is int and type(vars(here).get(name)) is int and vars(here)[name] != value:
                    self._sizes.append((here, name, value))

    @classmethod
    def of(cls, model: PreTrainedModel, blocks: list[ExpertBlock], plan: PruningPlan) -> Rerouting | None:
        """What a plan does to the routers; `None` if all experts stay."""
        return cls(model, blocks, plan.routed) if plan.dropped else None

    @contextmanager
    def active(self, blocks: list[ExpertBlock]) -> Iterator[None]:
        """Until the block ends, tokens go to the experts that stay alone, under the numbers that these have in the unpruned model.

        Args:
            blocks (`list[ExpertBlock]`): whose routers and experts have their weights in memory now.
        """
        config = experts_config(self._model, self._blocks)
        paths = {block.path for block in blocks}
        with ExitStack() as undo:
            undo.callback(setattr, config, self._routing.field, getattr(config, self._routing.field))
            setattr(config, self._routing.field, self._count)
            for module, name, value in self._sizes:
                undo.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
            for path, rows in self._routing.rows.items():
                if rows.block in paths:
                    owner, _, name = path.rpartition(".")
                    module = self._model.get_submodule(owner)
                    table = module._parameters if name in module._parameters else module._buffers
                    undo.callback(table.__setitem__, name, table[name])
                    made = rows.select(table[name].detach(), self._routed[rows.block])
                    is_parameter = table is module._parameters
                    table[name] = torch.nn.Parameter(made, requires_grad=False) if is_parameter else made
            for block in blocks:
                hook = block.module.register_forward_pre_hook(
                    _numbered(self._routed[block.path], block.num_experts), with_kwargs=True, prepend=True
                )
                undo.callback(hook.remove)
            yield


def _numbered(routed: list[int], num_experts: int) -> Callable:
    """A hook that calls experts by their numbers in the unpruned model; one past the last stays one past the last."""
    numbers = torch.tensor([*routed, num_experts])

    def hook(module: torch.nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        def number(index: torch.Tensor) -> torch.Tensor:
            return numbers.to(index.device)[index.clamp(max=len(routed))].to(index.dtype)

        if "top_k_index" in named:
            return inputs, {**named, "top_k_index": number(named["top_k_index"])}
        hidden, index, *rest = inputs
        return (hidden, number(index), *rest), named

    return hook
