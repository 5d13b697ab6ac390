# Licensed under the Apache License, Version 2.0
"""Adds what several processes measured layer by layer, so that it can be killed at any moment and gone on with.

Each process has its part of each block in a file that nothing replaces. The first process alone keeps sums: it writes one
under a name of its own, then marks it as added, and then drops its part. Whoever goes on adds again what has no mark, from
parts that are what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..utils.errors import HeaprError
from ..utils.logging import progress
from .processes import add_numbers, finished_blocks, from_process
from .statistics import BlockStatistics


if TYPE_CHECKING:
    from accelerate import Accelerator

    from .layer_state import LayerProgress, LayerState
    from .state import Interruption


def add_parts(
    accelerator: Accelerator,
    state: LayerState,
    done: LayerProgress,
    finish: Callable[[str, BlockStatistics], BlockStatistics],
    interrupted: Interruption,
) -> dict[str, BlockStatistics]:
    """The sums over processes of all blocks that were measured.

    Args:
        accelerator (`Accelerator`): connects the processes.
        state (`LayerState`): holds the parts of this process, and on the first one the sums.
        done (`LayerProgress`): of this process; its marks are set on the first one.
        finish (`Callable`): makes what is kept of a block from its sum.
        interrupted (`Interruption`): a signal takes effect between blocks.

    Returns:
        `dict[str, BlockStatistics]`: by block path; matrices, mapped from the files of `state`, on the first process alone.

    Raises:
        HeaprError: if another process ended before, or the tokens in a sum are not those that the processes counted.
    """
    paths = sorted(done.routed)
    added = from_process(accelerator, done.added)
    counts = dict(zip(paths, add_numbers(accelerator, [done.routed[path] for path in paths])))
    found = {}
    # As many at a time as there are processes: each finishes one, and the first holds the matrices of no more.
    number = accelerator.num_processes
    for start in progress(range(0, len(paths), number), desc="Adding", unit="turn"):
        interrupted.act()
        turn = paths[start : start + number]
        missing = ((path, state.read_part(path)) for path in turn if path not in added)
        for path, block in finished_blocks(accelerator, missing, finish).items():
            if accelerator.is_main_process:
                state.write_block(path, block)
                done.added.append(path)
                state.save(done)
        for path in turn:
            mine = None
            if accelerator.is_main_process:
                state.drop_part(path)
                mine = state.read_block(path)
            vectors = from_process(accelerator, mine and mine.without_grams())
            _check_count(path, vectors, counts[path])
            found[path] = mine or vectors
    return found


def _check_count(path: str, block: BlockStatistics, count: int) -> None:
    """Each token counts once for each expert that it was routed to."""
    if int(block.token_count.sum()) != count:
        raise HeaprError(
            f"state: the sum of {path} holds {int(block.token_count.sum())} routed tokens, and the processes counted {count}; "
            "delete the state folders of all processes to begin anew"
        )
