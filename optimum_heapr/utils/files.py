# Licensed under the Apache License, Version 2.0
"""Writing files and folders so that a kill at any moment leaves the old one or the new one, never a torn one."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import HeaprError
from .logging import get_logger
from .manifest import foreign_file, write_manifest


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = get_logger(__name__)


@contextmanager
def replace_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what was written there takes the place of `path` when the block ends.

    Raises:
        HeaprError: if the folder cannot be written to.
    """
    path = Path(path)
    with _parents(path):
        with _temporary(path, folder=False) as temporary:
            try:
                yield temporary
                _flush_to_disk(temporary)
                os.chmod(temporary, 0o666 & ~_current_umask())  # mkstemp makes files that only the owner can read
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`, which is renamed to `path` when the block ends without an error.

    A list of its files is written into it, so that `overwrite` never takes away what somebody else has put there.

    Raises:
        HeaprError: if `path` exists and is not an empty folder and `overwrite` is off, holds files that were not written
            this way or were changed since, or cannot be written.
    """
    path = Path(path)
    check_output_folder(path, overwrite)
    path = path.resolve()  # a link to a folder, or `.`, cannot be renamed onto
    with _parents(path):
        with _temporary(path, folder=True) as temporary:
            try:
                os.chmod(temporary, 0o777 & ~_current_umask())
                yield temporary
                write_manifest(temporary)
                for file in temporary.rglob("*"):
                    if file.is_file():
                        _flush_to_disk(file)
                check_output_folder(path, overwrite)  # it may have been filled in the meantime
                if path.is_dir() and any(path.iterdir()):
                    _replace_filled_folder(temporary, path)
                else:
                    os.replace(temporary, path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def check_output_is_not_input(output: str | os.PathLike, *inputs: str | None, argument: str = "output") -> None:
    """Refuses an output whose replacement would take an input away, or that would become part of one.

    Args:
        output (`str`): file or folder to be written.
        inputs (`str`, *optional*): what it is made from: paths, or names on the Hub.
        argument (`str`): what the caller knows the output as.

    Raises:
        HeaprError: if an input is the output, a file or folder inside it, or a folder around it.
    """
    place = Path(output).resolve()
    for name in filter(None, inputs):
        source = Path(name).resolve()
        if place == source or (source.exists() and place in source.parents):
            what = "is" if place == source else "holds"
            raise HeaprError(f"{argument}={str(output)!r}: {what} the input {name!r}; name another place")
        if source.is_dir() and source in place.parents:
            raise HeaprError(f"{argument}={str(output)!r}: lies inside the input {name!r}; name a place outside")


@contextmanager
def folder_beside(path: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty hidden folder on the disk of an output, for what is needed until the block ends.

    Raises:
        HeaprError: if the folder of the output cannot be written to.
    """
    path = Path(path).resolve()
    with _parents(path), _temporary(path, folder=True) as temporary:
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _temporary(path: Path, folder: bool) -> Iterator[Path]:
    """Makes an empty temporary file or folder beside `path`, and removes those that killed runs left there.

    Its maker holds a lock on it, which ends with the process: what can be locked is nobody's any more.
    """
    _remove_leftovers(path, folder)
    while True:
        make = tempfile.mkdtemp if folder else tempfile.mkstemp
        made = make(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(made if folder else made[1])
        if not folder:
            os.close(made[0])
        with _locked(temporary, wait=True):
            if temporary.exists():  # else another run took it for a leftover before it was locked
                yield temporary
                return


def _remove_leftovers(path: Path, folder: bool) -> None:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.tmp")  # the eight are those of tempfile
    try:
        entries = list(path.parent.iterdir())
    except OSError:  # a folder that may be written to, but not listed
        return
    for entry in entries:
        if not pattern.fullmatch(entry.name) or entry.is_symlink() or entry.is_dir() != folder:
            continue
        with _locked(entry) as locked:
            if locked:
                logger.info("Removing %s, which an interrupted run left.", entry)
                shutil.rmtree(entry, ignore_errors=True) if folder else entry.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether a lock on a file or folder was got; it is held while the block runs. `False` where there are no such locks."""
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        locked = True
    except (OSError, AttributeError):
        locked = False
    try:
        yield locked
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Makes the folders above `path` if need be; they go again if the block ends with an error.

    Raises:
        HeaprError: if they cannot be written to.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        _remove_empty(missing)
        raise HeaprError(
            f"output={str(path)!r}: cannot be written ({error.strerror}); name a folder you own"
        ) from error
    try:
        yield
    except BaseException:
        _remove_empty(missing)
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # innermost first
        with contextlib.suppress(OSError):
            folder.rmdir()


def _replace_filled_folder(new: Path, path: Path) -> None:
    """Puts `new` in the place of `path`; what was there is deleted."""
    if _exchange(new, path):
        return  # the caller deletes `new`, which is now the old folder
    # No exchange in one step here: the old folder steps aside and comes back on an error.
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        os.replace(path, aside)
        os.replace(new, path)
    except BaseException:
        if not path.exists():
            os.replace(aside, path)
        raise
    finally:
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one step, so that a kill cannot fall in between; `False` where the system has no such call."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    at_current_folder, rename_exchange = -100, 2
    paths = os.fsencode(first.absolute()), os.fsencode(second.absolute())
    return renameat2(at_current_folder, paths[0], at_current_folder, paths[1], rename_exchange) == 0


def beside(path: str | os.PathLike, ending: str) -> Path:
    """A place beside an output and named after it, also if the output is named `.` or with a slash at its end."""
    path = os.path.normpath(path)
    return Path(f"{os.path.abspath(path) if path in ('.', '..') else path}{ending}")


def check_output_folder(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Refuses an output that would be lost or mixed up, before any work is done for it.

    Raises:
        HeaprError: if `path` is a file, a non-empty folder without `overwrite` or with files that this package did not write
            or that were changed since,
            or below a folder without write access.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise HeaprError(f"output={str(path)!r}: is a file; name a folder")
    if path.is_dir() and (foreign := foreign_file(path)):
        raise HeaprError(
            f"output={str(path)!r}: folder is not empty, and holds {foreign[0]!r}, {foreign[1]}; move that away or name another "
            "folder"
        )
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise HeaprError(f"output={str(path)!r}: folder is not empty; name another or pass overwrite=True")
    _check_writable(path)


def check_output_file(path: str | os.PathLike, overwrite: bool = False) -> None:
    """As [`check_output_folder`], for one file.

    Raises:
        HeaprError: if `path` is a folder, exists without `overwrite`, or lies below a folder without write access.
    """
    path = Path(path)
    if path.is_dir():
        raise HeaprError(f"output={str(path)!r}: is a folder; name a file")
    if path.exists() and not overwrite:
        raise HeaprError(f"output={str(path)!r}: file exists; name another or pass overwrite=True")
    _check_writable(path)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes `content` as indented JSON, whole or not at all."""
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_writable(path: Path) -> None:
    existing = path.parent
    while not existing.exists():
        existing = existing.parent
    # Permissions alone do not tell: the superuser has them all, and some file systems take no files.
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise HeaprError(
            f"output={str(path)!r}: {str(existing)!r} is not writable ({error.strerror}); name a folder you own"
        ) from error


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
