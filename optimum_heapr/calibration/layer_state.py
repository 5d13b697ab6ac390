# Licensed under the Apache License, Version 2.0
"""What a calibration layer by layer leaves on disk: how far it came, and the statistics of the layers that are done."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..utils.artefacts import read_artefact, write_artefact
from ..utils.errors import HeaprError, reason_of
from ..utils.files import write_json
from ..utils.logging import get_logger
from .state import check_save_every, differences, state_path
from .statistics import BlockStatistics


BLOCK_FORMAT = "heapr_block"
PROGRESS_NAME = "progress.json"
_WRITTEN = (".safetensors", ".tmp")  # beside it: statistics, layer inputs, and what a kill leaves of either

logger = get_logger(__name__)


@dataclass
class LayerProgress:
    """How far one process came.

    Attributes:
        forward (`int`): layers whose outputs are stored.
        head (`bool`): whether the gradients of the last hidden states are stored.
        backward (`int`): layers, from the last, that are done.
        losses (`dict[str, list]`): by number of the micro-batch: summed loss in nats, and tokens predicted.
        skipped (`list[int]`): micro-batches that are in no statistic, because something was not finite.
        routed (`dict[str, int]`): by path of a block that is done: how often this process saw a token routed to an expert.
        added (`list[str]`): of several processes, on the first: paths of blocks whose sum over all of them is written.
    """

    forward: int = 0
    head: bool = False
    backward: int = 0
    losses: dict[str, list] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    routed: dict[str, int] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)


class StateFolder:
    """The folder that a calibration layer by layer is resumed from. With several processes each has its own.

    Args:
        path (`str`): the folder.
        resume (`bool`): go on from the folder, if there is one.
        save_every (`int`): not used: it is written after each layer.

    Raises:
        HeaprError: if the folder exists and `resume` is off, it is the file of a calibration of another kind, or `save_every` is
            negative.
    """

    def __init__(self, path: str | os.PathLike, resume: bool = False, save_every: int = 0):
        check_save_every(save_every)
        self.path = state_path(path)
        if self.path.is_file():
            raise HeaprError(
                f"state={str(self.path)!r}: was saved by a calibration that is not streaming; go on with memory='plain' or "
                "memory='offload', or delete the file to begin anew"
            )
        if not self.path.exists() or self._was_removed():
            return
        if not (self.path / PROGRESS_NAME).is_file():
            raise HeaprError(
                f"state={str(self.path)!r}: is a folder that no calibration wrote, and would be deleted at the end; name another, "
                "or delete it"
            )
        if not resume:
            raise HeaprError(
                f"state={str(self.path)!r}: a calibration was interrupted here; pass resume=True to go on, or "
                "delete the folder to begin anew"
            )

    def _was_removed(self) -> bool:
        """Whether nothing is left but what a network file system keeps of files while they are mapped."""
        return all(entry.name.startswith(".nfs") for entry in self.path.iterdir())

    def remove(self) -> None:
        """Deletes the folder, once the statistics are safe."""
        if not self.path.is_dir():
            return
        # First what says how far it came: after that, what else a kill leaves here is begun anew.
        write_json(self.path / PROGRESS_NAME, {"run": None})
        for entry in self.path.iterdir():
            if entry.name.endswith(_WRITTEN):
                entry.unlink()
        (self.path / PROGRESS_NAME).unlink()
        try:
            self.path.rmdir()
        except OSError:
            if not self._was_removed():
                logger.warning("%s was left: it holds files that no calibration wrote", self.path)


class LayerState:
    """
    The folder of a calibration layer by layer: of one process, or each of several has its own.

    Args:
        folder (`Path`): exists.
        resumable (`bool`): whether another run may go on from it; otherwise only finished layers are in it.
    """

    def __init__(self, folder: Path, resumable: bool = False):
        self.folder, self.resumable = folder, resumable
        self._run: dict[str, Any] = {}

    @property
    def _file(self) -> Path:
        return self.folder / PROGRESS_NAME

    def begin(self, run: dict[str, Any]) -> LayerProgress:
        """How far an earlier run came, if there was one.

        Args:
            run (`dict`): what the statistics depend on: model, data, options; plain JSON types.

        Raises:
            HeaprError: if the folder is damaged, or of a run that differs; the message names what does.
        """
        self._run = json.loads(json.dumps(run))
        if not (self.resumable and self._file.is_file()):
            return self._begun()
        try:
            document = json.loads(self._file.read_text(encoding="utf-8"))
            if document["run"] is None:  # it was being removed
                return self._begun()
            found = differences(document["run"], self._run)
            progress = LayerProgress(**document["progress"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise HeaprError(
                f"state={str(self.folder)!r}: is damaged ({reason_of(error)}); delete the folder to begin anew"
            ) from error
        if found:
            raise HeaprError(
                f"state={str(self.folder)!r}: saved by a run that differs ({'; '.join(found)}); resume with the same model, "
                "data and options, or delete the folder to begin anew"
            )
        logger.warning(
            "Going on after %d layers forward and %d backward, from %s",
            progress.forward,
            progress.backward,
            self.folder,
        )
        return progress

    def _begun(self) -> LayerProgress:
        """Nothing yet; the folder is marked as one of a calibration, which alone are deleted."""
        progress = LayerProgress()
        self.save(progress)
        return progress

    def save(self, progress: LayerProgress) -> None:
        """Writes how far this run came, whole or not at all."""
        if self.resumable:
            write_json(self._file, {"run": self._run, "progress": dataclasses.asdict(progress)})

    def write_block(self, path: str, block: BlockStatistics) -> None:
        """Writes the statistics of one expert block, whole or not at all."""
        self._write(path, block, "block")

    def read_block(self, path: str) -> BlockStatistics:
        """The statistics of one expert block; matrices are mapped from the file, so that they take no memory yet.

        Raises:
            HeaprError: if they are missing or damaged.
        """
        return self._read(path, "block")

    def write_part(self, path: str, block: BlockStatistics) -> None:
        """As [`write_block`], what this process of several measured of it; the sum over all of them is another file."""
        self._write(path, block, "part")

    def read_part(self, path: str) -> BlockStatistics:
        """As [`read_block`], what [`write_part`] wrote."""
        return self._read(path, "part")

    def drop_part(self, path: str) -> None:
        """Deletes what [`write_part`] wrote, if it is there."""
        self._file_of(path, "part").unlink(missing_ok=True)

    def _write(self, path: str, block: BlockStatistics, kind: str) -> None:
        tensors = {part.name: getattr(block, part.name) for part in fields(block)}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        write_artefact(self._file_of(path, kind), BLOCK_FORMAT, tensors, {})

    def _read(self, path: str, kind: str) -> BlockStatistics:
        tensors, _ = read_artefact(self._file_of(path, kind), BLOCK_FORMAT)
        # What is small is not mapped: then nothing hangs on the file where there are no matrices.
        return BlockStatistics(
            **{name: tensor if "_gram_" in name else tensor.clone() for name, tensor in tensors.items()}
        )

    def _file_of(self, path: str, kind: str) -> Path:
        return self.folder / f"{path}.{kind}.safetensors"
