# Licensed under the Apache License, Version 2.0
"""How a calibration runs: where the memory comes from, where it is saved, and the processes that share it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configuration import MEMORY, HeaprConfig
from ..utils.errors import HeaprError
from .options import given, model_options_from


if TYPE_CHECKING:
    from ..calibration.layer_state import StateFolder
    from ..calibration.state import StateFile
    from ..calibration.statistics import AtomicStatistics


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--memory`, `--activation-memory` and `--tp-plan`, for commands that calibrate."""
    parser.add_argument(
        "--memory",
        default="auto",
        metavar="{" + ",".join(MEMORY) + "}",
        help="plain: all weights at once; streaming: one layer at a time, each read twice in all; offload: what does not "
        "fit stays on the host or the disk, and layers are computed twice; auto: as the estimate says (default: auto)",
    )
    parser.add_argument(
        "--activation-memory",
        metavar="SIZE",
        help="for streaming: host memory for the inputs of all layers, e.g. 8GB; more goes to the disk of the output "
        "(default: a quarter of what is free)",
    )
    parser.add_argument(
        "--tp-plan",
        metavar="{auto,experts}",
        help="split the weights over the processes of torchrun or accelerate: all that transformers' plan for the model splits, "
        "or of that the experts alone; each process measures its part of every expert on all of the text",
    )


def add_state_options(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds `--save-every` and `--resume`, for commands that calibrate; `more` is what else is gone on from."""
    parser.add_argument(
        "--save-every",
        type=int,
        default=0,
        metavar="K",
        help="save the calibration to OUTPUT.state every K micro-batches, or with --memory streaming, whatever K, after each layer",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help=f"go on from OUTPUT.state, if it is there; also saved on Ctrl-C{more}",
    )


def state_from(
    args: argparse.Namespace, memory: str, calibrates: bool = True
) -> tuple[StateFile | StateFolder | None, dict[str, Any]]:
    """Where a calibration is saved, if there is one and that was asked for, and the options of [`HeaprPruner.calibrate`] that say so.

    The command removes it once its output is safe. What an earlier run left stays where nothing is calibrated.

    Raises:
        HeaprError: if there is one and `--resume` was not passed, it is of another mode of `--memory`, the command has no output, or
            `--save-every` is negative.
    """
    from ..calibration.layer_state import StateFolder
    from ..calibration.state import StateFile, check_save_every
    from ..utils.files import beside

    check_save_every(args.save_every)
    if not calibrates:
        return None, {}
    state_class = StateFolder if memory == "streaming" else StateFile
    if not (args.resume or args.save_every):
        if args.output is not None:
            state_class(beside(args.output, ".state"))  # refuses to begin anew what was interrupted
        return None, {}
    if args.output is None:
        raise HeaprError("output=None: --save-every and --resume use OUTPUT.state; name the output with -o")
    path, saving = beside(args.output, ".state"), {"resume": args.resume, "save_every": args.save_every}
    return state_class(path, **saving), {"state_path": path, "keep_state": True, **saving}


def fits_from(args: argparse.Namespace) -> Path:
    """Where blocks are kept that were compensated over or trained, until the output is safe.

    Raises:
        HeaprError: if a run that was ended left some there and `--resume` was not passed, or there is something else.
    """
    from ..utils.files import beside

    path = beside(args.output, ".fits")
    if path.is_file():
        raise HeaprError(
            f"fits={str(path)!r}: is a file, where the folder of blocks that are fitted would be; delete it, or name another output"
        )
    if path.exists() and not args.resume:
        raise HeaprError(
            f"fits={str(path)!r}: a run was interrupted here while it fitted blocks; pass --resume to go on, or delete the folder "
            "to begin anew"
        )
    return path


def check_resume(args: argparse.Namespace, calibrates: bool, fits: Path | None) -> None:
    """Says where `--resume` or `--save-every` is about nothing; of a calibration, its state says that.

    Args:
        args (`argparse.Namespace`): the flags.
        calibrates (`bool`): whether something is going to be measured.
        fits (`Path`, *optional*): of [`fits_from`], if blocks are fitted.
    """
    from ..utils.logging import say_nothing_to_resume, say_once

    if calibrates:
        return
    if fits is None:
        for name in ("save_every", "resume"):
            if value := getattr(args, name, None):
                say_once(f"{name}={value}: has no use, as nothing is calibrated and no block is fitted")
    elif args.resume and not fits.exists():
        say_nothing_to_resume("fits", fits)


@contextmanager
def chosen_memory(args: argparse.Namespace, config: HeaprConfig) -> Iterator[dict[str, Any]]:
    """Prints what calibrating needs, and yields how to load the model, as keyword arguments of `from_pretrained`.

    What does not fit goes into a hidden folder on the disk of the output, which is gone when the block ends, or, if the run is
    killed, when the next one begins.

    Raises:
        HeaprError: if there is no such mode, size or dtype.
    """
    from ..checkpoints.loading import choose_memory
    from ..utils.files import folder_beside
    from ..utils.logging import is_main_process
    from ..utils.sizes import parse_size

    options = {**model_options_from(args), **given(args, "tp_plan")}
    budget = parse_size("activation_memory", args.activation_memory) if args.activation_memory else None
    memory, estimate = choose_memory(args.model, config, args.memory, budget, **options)
    if estimate is not None and is_main_process():
        print(estimate, flush=True)
    loading = {"memory": memory, "activation_memory": args.activation_memory, **options}
    if memory == "plain":
        yield loading
        return
    with folder_beside(args.output or "pruned") as folder:
        yield {**loading, "offload_folder": str(folder)}


def kept_path(output: str) -> Path:
    """Where [`kept_statistics`] are, until the output is safe.

    Raises:
        HeaprError: if a run that failed left some there.
    """
    from ..utils.files import beside

    path = beside(output, ".statistics.safetensors")
    if path.exists():
        raise HeaprError(
            f"statistics={str(path)!r}: a run that failed after calibrating left them; pass -s {path} to go on from them, or "
            "delete the file to calibrate anew"
        )
    return path


@contextmanager
def kept_statistics(statistics: AtomicStatistics, path: Path, grams: bool) -> Iterator[None]:
    """Keeps what was measured in a file until the block ends, so that nothing that fails in it takes that along.

    Args:
        statistics (`AtomicStatistics`): of a calibration that has just ended.
        path (`Path`): the file, which goes again if the block ends well.
        grams (`bool`): whether what comes next needs the matrices.
    """
    from ..utils.logging import get_logger

    try:
        statistics.save(path, grams=grams)
    except (HeaprError, OSError) as error:
        get_logger(__name__).warning("The statistics are kept in memory alone until the output is written (%s)", error)
        yield
        return
    left = f"what was measured is in {path}, and -s {path} goes on from that"
    try:
        yield
    except HeaprError as error:
        raise HeaprError(f"{error}; {left}") from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(left) from error
    except BaseException:
        print(left, file=sys.stderr)
        raise
    path.unlink()


def end_processes(state: StateFile | StateFolder | None = None) -> None:
    """Closes what connects the processes of one run, if there are several; from here on each is alone.

    Args:
        state (`StateFile` or `StateFolder`, *optional*): what is not needed any more once the first process, the only one
            that writes, is here: its output is safe then. It is removed.

    Raises:
        HeaprError: if another process ended before; the state is left where it is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        from ..calibration.processes import peers_needed

        if state is not None:
            with peers_needed("its output was written"):
                PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
    if state is not None:
        state.remove()
