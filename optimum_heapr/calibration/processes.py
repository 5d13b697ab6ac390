# Licensed under the Apache License, Version 2.0
"""Many processes: each measures its share of the samples, and the sums are added at the end."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from ..utils.errors import HeaprError
from ..utils.logging import get_logger, progress
from .state import differences
from .statistics import BlockStatistics


if TYPE_CHECKING:
    from accelerate import Accelerator

    from .state import Progress


logger = get_logger(__name__)

PATIENCE = timedelta(days=1)
"""How long a process that is done waits for the others. Shares may take hours longer than one another: hosts differ, and a
resumed process may have more left. One that died does not take this long to be noticed: its connection is closed, or the
launcher ends the run."""


_SHARDING_LAUNCHES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""What `accelerate launch` sets for each way of spreading one model over processes."""

_WHOLE_MODEL = (
    "each process of a calibration holds the whole model and measures its share of the samples; leave the sharding out, and "
    "where a model does not fit use tp_plan='auto', or one process with memory='auto' or device_map='auto'"
)


def check_launcher() -> None:
    """Refuses launchers that have the model spread over processes, before it is loaded.

    With FSDP, for one, transformers loads the weights on the first process only, and the others would measure noise.

    Raises:
        HeaprError: naming what the launcher was told to use.
    """
    for variable, name in _SHARDING_LAUNCHES.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            raise HeaprError(f"launcher: accelerate uses {name} ({variable}); {_WHOLE_MODEL}")


def start_processes(is_sharded: bool = False) -> Accelerator:
    """Connects the processes of this run, if there are several and they are not yet.

    One that ends before it is connected is waited for, as one that is late; one that ends afterwards is noticed.

    Args:
        is_sharded (`bool`): whether the model is spread over them already, so that the launcher may say that it is to be.

    Raises:
        HeaprError: as [`check_launcher`].
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    if not is_sharded:
        check_launcher()
    asked = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ)
    if asked and "WORLD_SIZE" not in os.environ:
        # Without several GPUs in this host, or with --cpu, accelerate prepares for several processes and starts one.
        _say_that_one_was_started()
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


@functools.cache  # a run connects its processes before it loads, and again where it measures
def _say_that_one_was_started() -> None:
    logger.warning(
        "accelerate launch was asked for several processes but started one, which does all the work. On CPUs use "
        "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
    )


def connected_processes() -> Accelerator | None:
    """What connects the processes of this run; `None` where there is one, or from where on each of several is alone.

    Raises:
        HeaprError: as [`check_launcher`].
    """
    accelerator = start_processes(is_sharded=torch.distributed.is_initialized())
    return accelerator if accelerator.num_processes > 1 and torch.distributed.is_initialized() else None


def check_placement(model: torch.nn.Module, num_processes: int) -> None:
    """Refuses a model whose parts are spread over devices by each of several processes.

    Raises:
        HeaprError: naming the devices.
    """
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if num_processes > 1 and len(devices) > 1:
        raise HeaprError(
            f"device_map: spreads the model over {', '.join(sorted(devices))}, and each of {num_processes} processes would "
            "do so; launch one process, or leave device_map out"
        )


def check_same_run(accelerator: Accelerator, run: dict[str, Any]) -> None:
    """Refuses processes whose sums are not of the same model, text and options, before anything is measured.

    Args:
        accelerator (`Accelerator`): connects the processes.
        run (`dict`): what the sums of this process depend on, plain JSON types.

    Raises:
        HeaprError: naming a process, what differs, and both values; or if another process ended before.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    with peers_needed("what each is about to measure could be compared"):
        first, *others = gather_object([run])
    for rank, other in enumerate(others, 1):
        found = differences(*_comparable(first, other), wording=f"{{}} is {{}} on rank 0 and {{}} on rank {rank}")
        if found:
            raise HeaprError(
                f"processes: their sums cannot be added, {'; '.join(found)}; start all of them with the same model, text and "
                "options"
            )


def _comparable(*runs: dict[str, Any]) -> list[dict[str, Any]]:
    """Without what may differ between hosts: the name of the text, and hashes of weights that one of them has offloaded."""
    models = [run.get("model", {}) for run in runs]
    unknown = {name for model in models for name, value in model.items() if value is None}
    data = [{key: value for key, value in run.get("data", {}).items() if "source" not in key} for run in runs]
    return [
        {**run, "data": text, "model": {key: value for key, value in model.items() if key not in unknown}}
        for run, text, model in zip(runs, data, models)
    ]


def finished_blocks(
    accelerator: Accelerator,
    blocks: Iterable[tuple[str, BlockStatistics]],
    finish: Callable[[str, BlockStatistics], BlockStatistics] | None = None,
) -> dict[str, BlockStatistics]:
    """Expert blocks of which the sums of all processes were added, and each then finished by one of the processes.

    Until all are finished each process but the first has the second-order matrices of those that it finishes, and the first has all.

    Args:
        accelerator (`Accelerator`): connects the processes.
        blocks (`Iterable`): paths and what this process measured of each, in the same order on each of them.
        finish (`Callable`, *optional*): makes what is kept of a block from its sums; takes long, and no other process.

    Returns:
        `dict[str, BlockStatistics]`: by block path; matrices on the first process alone.

    Raises:
        HeaprError: if another process ended before.
    """
    number, rank = accelerator.num_processes, accelerator.process_index
    found = {}
    for turn, (path, block) in enumerate(blocks):
        finisher = 0 if finish is None else turn % number
        total = add_block(accelerator, block, first_only=finisher == 0)
        found[path] = total if rank in (0, finisher) else total.without_grams()
    if finish is None:
        return {path: block if rank == 0 else block.without_grams() for path, block in found.items()}
    for path in progress(list(found)[rank::number], desc="Ordering", unit="layer", leave=False):
        found[path] = finish(path, found[path])
    for turn, (path, block) in enumerate(found.items()):
        vectors, kept = from_process(accelerator, (block.without_grams(), block.has_grams), turn % number)
        matrices = {name: part for name, part in block.sums.items() if "_gram_" in name and kept and rank == 0}
        found[path] = replace(vectors, **matrices)
    return found


def add_block(accelerator: Accelerator, block: BlockStatistics, first_only: bool) -> BlockStatistics:
    """The sums of one expert block over all processes, on each of them, in the memory of what this one measured where it can be.

    Args:
        accelerator (`Accelerator`): connects the processes.
        block (`BlockStatistics`): what this process measured; not to be used any more.
        first_only (`bool`): whether matrices are needed on the first process alone; those of the others are then no sums.

    Raises:
        HeaprError: if another process ended before.
    """
    if accelerator.num_processes == 1:
        return block
    with peers_needed():
        sums = {
            name: added(accelerator, tensor, first_only=first_only and "_gram_" in name)
            for name, tensor in block.sums.items()
        }
        return replace(block, **sums)


def add_numbers(accelerator: Accelerator, numbers: list[int]) -> list[int]:
    """The sum of each number over all processes, on each of them.

    Raises:
        HeaprError: if another process ended before.
    """
    with peers_needed():
        return added(accelerator, torch.tensor(numbers, dtype=torch.int64)).tolist()


def from_process(accelerator: Accelerator, value: Any, rank: int = 0) -> Any:
    """What the process of this rank has, on each of them.

    Raises:
        HeaprError: if another process ended before.
    """
    from accelerate.utils import broadcast_object_list

    if accelerator.num_processes == 1:
        return value
    with peers_needed():
        return broadcast_object_list([value], rank)[0]


def add_progress(accelerator: Accelerator, done: Progress) -> tuple[float, int, list[int]]:
    """Summed loss, tokens predicted, and samples that were left out, over all processes.

    Raises:
        HeaprError: if another process ended before.
    """
    from accelerate.utils import gather_object

    if accelerator.num_processes == 1:
        return done.loss, done.targets, done.skipped
    with peers_needed():
        loss, targets = added(accelerator, torch.tensor([done.loss, done.targets], dtype=torch.float64)).tolist()
        return loss, int(targets), sorted(gather_object(done.skipped))


def added(accelerator: Accelerator, tensor: torch.Tensor, first_only: bool = False) -> torch.Tensor:
    """The sum over all processes, on each of them the same bits, on the device of the tensor.

    Not by accelerate, which copies the tensor first: here the sum takes its place, unless it is on another device or a slice.

    Args:
        accelerator (`Accelerator`): connects the processes.
        tensor (`torch.Tensor`): of this process; overwritten.
        first_only (`bool`): whether the first process alone needs the sum; the others then have no use for what they are given.
    """
    # To accelerate the CPU of several processes is cpu:0, which torch takes for another device than cpu, and copies.
    is_here = tensor.device.type == accelerator.device.type == "cpu"
    # Of a slice what lies between would be added, too.
    here = (tensor if is_here else tensor.to(accelerator.device)).contiguous()
    if first_only:
        torch.distributed.reduce(here, dst=0)
    else:
        torch.distributed.all_reduce(here)
    return here.to(tensor.device)


@contextmanager
def peers_needed(for_what: str = "the sums could be added") -> Iterator[None]:
    """Says in one line that another process ended before something could be done together.

    Raises:
        HeaprError: in place of what the connection to it raises.
    """
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise HeaprError(
            f"processes: another one ended before {for_what} ({reason}); see what it printed, and run again, "
            "with resume=True if save_every was set"
        ) from error
