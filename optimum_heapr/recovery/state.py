# Licensed under the Apache License, Version 2.0
"""The folder of a run: the checkpoints of the `Trainer`, the cached teacher, and what run they are of."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..calibration.processes import start_processes
from ..utils.errors import HeaprError, reason_of
from ..utils.files import write_json
from ..utils.logging import get_logger, is_main_process, say_nothing_to_resume


logger = get_logger(__name__)

_OURS = ("run.json", "teacher")
_LAST_WRITTEN = "checkpoint-*/trainer_state.json"


class RunFolder:
    """Where a run keeps what it needs to go on after an interruption.

    As a context it is deleted when the run ends, or when it fails before there is anything to go on from.

    Args:
        path (`str`): the folder; made when it is needed.
        resume (`bool`): go on from it, if it is there.

    Raises:
        HeaprError: if it is there and `resume` is off, or it holds no run: it would be deleted at the end.
    """

    def __init__(self, path: str | os.PathLike, resume: bool = False):
        self.path = Path(path)
        if self.path.is_dir() and any(self.path.iterdir()) and not any((self.path / name).exists() for name in _OURS):
            raise HeaprError(f"state={str(path)!r}: holds something else than a run of recovery; name another folder")
        if self.path.exists() and not resume and is_main_process():
            raise HeaprError(
                f"state={str(path)!r}: a run that was interrupted; pass resume=True to go on, or remove it"
            )
        if resume and not self.path.exists():  # a temporary one is there and empty, and nobody asked to go on from it
            say_nothing_to_resume("state", self.path)

    def begin(self, run: dict[str, Any]) -> None:
        """Records what the run depends on, or compares it with what is recorded.

        Args:
            run (`dict`): JSON values: model, configuration, data.

        Raises:
            HeaprError: naming the first difference.
        """
        about = self.path / "run.json"
        run = json.loads(json.dumps(run))
        if not about.is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            if is_main_process():
                write_json(about, run)
            return
        try:
            found = dict(json.loads(about.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise HeaprError(
                f"state={str(self.path)!r}: is damaged ({reason_of(error)}); delete the folder to begin anew"
            ) from error
        for name in run:
            if found.get(name) != run[name]:
                raise HeaprError(
                    f"{name}={json.dumps(run[name])}: the run in {str(self.path)!r} has {json.dumps(found.get(name))}; resume "
                    "with what it was started with, or remove it"
                )

    @property
    def last_checkpoint(self) -> str | None:
        """Path of the newest checkpoint that is complete: the state of the `Trainer` is written last."""
        complete = {int(path.parent.name.split("-")[1]): path.parent for path in self.path.glob(_LAST_WRITTEN)}
        return str(complete[max(complete)]) if complete else None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, error_type: type | None, *_: Any) -> None:
        if error_type is None:
            wait_for_all()  # the best state is read from here
        elif self.last_checkpoint or any(self.path.glob("teacher/*.safetensors")):
            logger.warning("%s was kept; resume to go on from it", self.path)
            return
        if is_main_process():
            shutil.rmtree(self.path, ignore_errors=True)


def wait_for_all() -> None:
    """Returns when all processes of this run have come here."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        start_processes().wait_for_everyone()
