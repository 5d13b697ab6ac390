# Licensed under the Apache License, Version 2.0
"""What each of several processes measures: some of the text with all weights, or all of it with some of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..experts import ExpertBlock
from ..utils.errors import HeaprError
from ..utils.sharded import is_shard, is_sharded
from .accumulator import Split
from .processes import peers_needed
from .state import Progress
from .statistics import BlockStatistics


if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh


Value = TypeVar("Value")

_OTHERWISE = "load it with tp_plan='auto', which splits experts by width, or use one process with memory='auto' or device_map='auto'"


class Share:
    """
    Some of the micro-batches: the process has all weights, and sums of its own, which are added to those of the others.

    Args:
        accelerator (`Accelerator`): connects the processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.description: dict[str, Any] = {}
        """What a run depends on besides the number of processes."""
        self.splits: dict[str, Split] = {}
        """By block path, which atomic experts of each expert are here, where others have the rest."""

    def micro_batches(self, number: int) -> Sequence[int | None]:
        """Which of so many this process measures; `None` where it only computes along with the others."""
        return range(self.accelerator.process_index, number, self.accelerator.num_processes)

    def parts(self, blocks: list[ExpertBlock]) -> list[ExpertBlock]:
        """The expert blocks as they are where they compute."""
        return blocks

    def agreed(self, value: Value | None) -> Value | None:
        """The value of the first of the processes that act together which has one."""
        return value

    def concerning(self, problem: Value | None, is_skipped: bool) -> Value | None:
        """A problem of this process or another that this one must act on, where it is left out or ends the run."""
        return problem

    def check_in_step(self, done: Progress) -> None:
        """Refuses processes that must go on together and did not come equally far.

        Raises:
            HeaprError: naming how far each came.
        """

    def counted(self, path: str, block: BlockStatistics) -> BlockStatistics:
        """What this process adds to the sums of an expert block."""
        return block

    def progress(self, done: Progress) -> Progress:
        """What this process adds to the loss and what was left out."""
        return done


class GatheredShare(Share):
    """
    Some of the micro-batches, of a model whose weights the processes gather layer by layer while they compute: FSDP. Each has to
    compute as often as the others.
    """

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        self.description = {"weights": "gathered"}

    def micro_batches(self, number: int) -> Sequence[int | None]:
        own, steps = super().micro_batches(number), -(-number // self.accelerator.num_processes)
        return [*own, *[None] * (steps - len(own))]

    def agreed(self, value: Value | None) -> Value | None:
        return next((found for found in self._all(value) if found is not None), None)

    def concerning(self, problem: Value | None, is_skipped: bool) -> Value | None:
        return problem if is_skipped else self.agreed(problem)

    def check_in_step(self, done: Progress) -> None:
        batches = self._all(done.batches)
        if len(set(batches)) > 1:
            raise HeaprError(
                f"state: was saved after {', '.join(map(str, batches))} micro-batches by the processes of one model, which go on "
                "together or not at all; delete the states to begin anew"
            )

    def _all(self, value: Value) -> list[Value]:
        from accelerate.utils import gather_object

        with peers_needed():
            return gather_object([value])


class WidthShare(GatheredShare):
    """
    Some atomic experts of every expert, for all of the text: tensor parallelism. What is measured of a whole expert, a token or
    a micro-batch is known to all of these processes, and the first one's counts.

    Args:
        accelerator (`Accelerator`): connects the processes.
        model (`PreTrainedModel`): the model.
        blocks (`list[ExpertBlock]`): its expert blocks.

    Raises:
        HeaprError: if its experts are not split by width over all processes.
    """

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, blocks: list[ExpertBlock]):
        super().__init__(accelerator)
        # What else is split is added up over the processes as well, and rounded before: other numbers come out.
        experts = tuple(f"{block.path}." for block in blocks)
        others = any(is_shard(part) for name, part in model.named_parameters() if not name.startswith(experts))
        self.description = {"weights": "split", "tp_plan": "auto" if others else "experts"}
        mesh = _mesh_of(model, accelerator.num_processes)
        self.splits = {block.path: _split(block, mesh) for block in blocks}

    def micro_batches(self, number: int) -> Sequence[int | None]:
        return range(number)

    def parts(self, blocks: list[ExpertBlock]) -> list[ExpertBlock]:
        parts = [self.splits[block.path].part for block in blocks]
        return [replace(block, width=part.stop - part.start) for block, part in zip(blocks, parts)]

    def concerning(self, problem: Value | None, is_skipped: bool) -> Value | None:
        return self.agreed(problem)

    def counted(self, path: str, block: BlockStatistics) -> BlockStatistics:
        split, sums = self.splits[path], {}
        for name, tensor in block.sums.items():
            if name.endswith(("token_count", "output_norm_sum")):
                sums[name] = tensor if self.accelerator.is_main_process else torch.zeros_like(tensor)
            else:
                sums[name] = split.placed_matrices(tensor) if "_gram_" in name else split.placed(tensor)
        return replace(block, **sums)

    def progress(self, done: Progress) -> Progress:
        return done if self.accelerator.is_main_process else Progress()


def share_of(model: torch.nn.Module, blocks: list[ExpertBlock], accelerator: Accelerator) -> Share:
    """What this process measures of a model that [`check_sharding`] let pass.

    Raises:
        HeaprError: if the model is not spread over all processes alike, or its experts are split otherwise than by width.
    """
    if not is_sharded(model):
        return Share(accelerator)
    gathering = [module for module in model.modules() if hasattr(module, "reshard")]
    if not gathering:
        return WidthShare(accelerator, model, blocks)
    for module in gathering:
        module.reshard()  # what a forward without a backward left gathered
    _mesh_of(model, accelerator.num_processes)
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {accelerator.device.type}:
        raise HeaprError(
            f"model: FSDP keeps its weights on {', '.join(sorted(devices))} and computes on {accelerator.device.type}; leave "
            "offloading out, or use memory='streaming'"
        )
    return GatheredShare(accelerator)


def check_sharding(model: torch.nn.Module) -> None:
    """Refuses a model that was wrapped for several processes, or spread over them in a way that cannot be measured.

    Raises:
        HeaprError: naming what was done to it.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise HeaprError("model: is wrapped in DistributedDataParallel; pass what is inside, model.module")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise HeaprError(
            f"model: is sharded by FSDP1, which hides its weights; use fully_shard of FSDP2, or {_OTHERWISE}"
        )
    asked = getattr(model.config, "distributed_config", None)
    is_by_expert = getattr(asked, "enable_expert_parallel", False) or getattr(asked, "ep_size", 1) > 1
    for name, found in (("expert", is_by_expert), ("pipeline", getattr(asked, "pp_size", 1) > 1)):
        if found:
            raise HeaprError(f"model: is spread over processes by {name} parallelism; {_OTHERWISE}")


def _mesh_of(model: torch.nn.Module, processes: int) -> DeviceMesh:
    """The processes that a model is spread over.

    Raises:
        HeaprError: if these are not all, or parts of it are spread in different ways, such as replicas, or both ways.
    """
    meshes = {parameter.device_mesh for parameter in model.parameters() if is_shard(parameter)}
    sizes = sorted(tuple(mesh.shape) for mesh in meshes)
    if sizes != [(processes,)]:
        raise HeaprError(
            f"model: is spread over {' and '.join(map(str, sizes))} processes, and accelerate connects {processes}; it has to be over "
            f"all of them, in one way (on CPUs set ACCELERATE_USE_CPU=true); {_OTHERWISE}"
        )
    return meshes.pop()


def slice_of(block: ExpertBlock, processes: int, rank: int = 0) -> slice:
    """Which atomic experts of each expert one of several processes has: equal parts, of which the last may be smaller.

    Raises:
        HeaprError: if one would have none.
    """
    step = -(-block.width // processes)
    if step * (processes - 1) >= block.width:
        raise _unshared(block, processes)
    return slice(rank * step, min((rank + 1) * step, block.width))


def _unshared(block: ExpertBlock, processes: int) -> HeaprError:
    return HeaprError(
        f"model: {block.path} has experts of width {block.width}, which {processes} processes cannot share; start a number of "
        "them that divides it"
    )


def _split(block: ExpertBlock, mesh: DeviceMesh) -> Split:
    """Which atomic experts of each expert of a block this process has.

    Raises:
        HeaprError: if the block is not split by width.
    """
    gate_up, down = block.module.gate_up_proj, block.module.down_proj
    axis = 1 if block.module.is_transposed else 2
    # [E, 2I, d] and [E, d, I], or transposed. Gate and up are each split, where they do not take turns row by row.
    expected = _placement(3 - axis, packed=block.module.is_concatenated), _placement(axis, packed=False)
    found = tuple(getattr(weight, "placements", ()) for weight in (gate_up, down))
    if found != tuple((placement,) for placement in expected) or block.module.has_bias:
        names = ", ".join(
            f"{name} {''.join(map(str, placements)) or 'whole'}"
            for name, placements in zip(("gate_up_proj", "down_proj"), found)
        )
        raise HeaprError(
            f"model: its plan does not split the experts by width alone ({block.path}: {names}"
            f"{', biases' if block.module.has_bias else ''}); {_OTHERWISE}"
        )
    part = slice_of(block, mesh.size(), mesh.get_local_rank())
    shapes = gate_up.to_local().shape[3 - axis], down.to_local().shape[axis]
    if shapes != (2 * (part.stop - part.start), part.stop - part.start):
        raise _unshared(block, mesh.size())
    return Split(mesh.get_group(), part, block.width)


def _placement(axis: int, packed: bool) -> Any:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    return _StridedShard(axis, split_factor=2) if packed else Shard(axis)
