# Licensed under the Apache License, Version 2.0
"""What this package wrote into a folder: only that is ever replaced."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from .companions import FOLDER


MANIFEST = f"{FOLDER}/files.json"
"""In a folder that this package wrote: names of the files that it wrote there, and what was in them."""

_PIECES, _PIECE_BYTES = 64, 2**16


def write_manifest(folder: Path) -> None:
    """Records the files below `folder`, which somebody may change later."""
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    files = {path.relative_to(folder).as_posix(): _digest(path) for path in paths}
    (folder / MANIFEST).parent.mkdir(exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(files, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def foreign_file(folder: Path) -> tuple[str, str] | None:
    """The first file below a folder, or link, or folder that cannot be looked into, that is not as this package wrote it.

    Returns:
        `tuple[str, str]`, *optional*: its path inside the folder, and what is the matter with it, as a clause.
    """
    known = _known(folder)
    try:
        for place, folders, files in os.walk(folder, onerror=_raise):
            folders.sort()
            links = [name for name in folders if os.path.islink(os.path.join(place, name))]
            names = [Path(place, name).relative_to(folder).as_posix() for name in sorted([*files, *links])]
            for name in names:
                if name not in known:
                    return name, "which this package has no record of writing"
                if known[name] is not None and known[name] != _digest(folder / name):
                    return name, "which was changed after this package wrote it"
    except OSError as error:
        return Path(error.filename).relative_to(folder).as_posix(), "which cannot be read"
    return None


def _known(folder: Path) -> dict[str, str | None]:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        # Earlier versions wrote names alone.
        return {MANIFEST: None, **(files if isinstance(files, dict) else dict.fromkeys(files))}
    except (OSError, ValueError, TypeError, RecursionError):  # none, or no list: nothing is known to be ours
        return {}


def _digest(path: Path) -> str:
    """Of the size and of pieces that are spread over the file, which is all of it up to 4 MiB: weights are changed throughout."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for piece in range(_PIECES):
            file.seek(max(piece * _PIECE_BYTES, piece * (size - _PIECE_BYTES) // (_PIECES - 1)))
            digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def _raise(error: OSError) -> None:
    raise error
