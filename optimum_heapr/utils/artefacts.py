# Licensed under the Apache License, Version 2.0
"""Artefacts between stages: one safetensors file each, tensors and a JSON document, nothing that could be executed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HeaprError, reason_of
from .files import check_output_file, replace_file


if TYPE_CHECKING:
    import torch


VERSION = "1"


def write_artefact(
    path: str | os.PathLike, format: str, tensors: dict[str, torch.Tensor], document: dict[str, Any]
) -> None:
    """Writes tensors and a JSON document as one file, whole or not at all.

    Raises:
        HeaprError: if the folder cannot be written to.
    """
    from .tensor_files import write_tensors

    # Not the library's writer: it puts several entries of metadata in random order, and equal artefacts shall be equal.
    metadata = {"format": format, "version": VERSION, "document": json.dumps(document)}
    with replace_file(path) as temporary:
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_tensors(temporary, shapes, lambda name: iter([tensors[name].cpu()]), metadata)


def read_artefact(
    path: str | os.PathLike, format: str, framework: str = "pt"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what [`write_artefact`] wrote: tensors on the CPU, and the document.

    Args:
        path (`str`): the file.
        format (`str`): that it must have.
        framework (`str`): `np` for NumPy arrays in place of tensors, as one who only looks at them need not wait for torch.

    Raises:
        HeaprError: if the file is missing, truncated, of another format or of a newer version.
    """
    from safetensors import safe_open

    what = format.removeprefix("heapr_")
    if not Path(path).is_file():
        raise HeaprError(f"{what}={str(path)!r}: no such file; name a file that this package wrote")
    try:
        with safe_open(path, framework=framework) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format:
                found = metadata.get("format", "unmarked")
                raise HeaprError(f"{what}={str(path)!r}: holds {found!r} data, not {format!r}; name the right file")
            if metadata.get("version") != VERSION:
                raise HeaprError(
                    f"{what}={str(path)!r}: has version {metadata.get('version')!r}, this package reads {VERSION!r}; "
                    "make it again or update optimum-heapr"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["document"])
    except HeaprError:
        raise
    except _damage() as error:
        raise HeaprError(
            f"{what}={str(path)!r}: truncated or not a safetensors file ({reason_of(error)}); make it again"
        ) from error


MODEL_PARTS = {"num_parameters": int, "parameters_per_atomic_expert": int}
"""What every stage reads of the fingerprint of a model."""


def check_parts(document: Any, kinds: dict[str, type | tuple[type, ...]]) -> None:
    """Refuses a mapping that lacks a part or has one of another type; what reads it says of which file.

    Raises:
        KeyError: if it lacks one.
        ValueError: if it is no mapping, or a part is of another type.
    """
    if not isinstance(document, dict):
        raise ValueError("it holds no mapping where one must be")
    for name, kind in kinds.items():
        if not isinstance(document[name], kind):
            raise ValueError(f"its {name!r} is {json.dumps(document[name])[:60]}, which it cannot be")


def _damage() -> tuple[type[Exception], ...]:
    """What the reading of a damaged file may end with."""
    from safetensors import SafetensorError

    return SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError


def artefact_format(path: str | os.PathLike) -> str | None:
    """What kind of artefact a file says it is; `None` if it does not say.

    Raises:
        HeaprError: if the file is missing, truncated or not a safetensors file.
    """
    from safetensors import safe_open

    if not Path(path).is_file():
        raise HeaprError(f"path={str(path)!r}: no such file; name a statistics file, a plan or a pruned model")
    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("format")
    except _damage() as error:
        raise HeaprError(f"path={str(path)!r}: truncated or not a safetensors file ({reason_of(error)})") from error


def check_output_artefact(path: str | os.PathLike, overwrite: bool = False) -> None:
    """As [`~optimum_heapr.utils.files.check_output_file`]; of files that exist only artefacts are replaced.

    Raises:
        HeaprError: as there, or if there is another file.
    """
    check_output_file(path, overwrite)
    if os.path.exists(path) and os.path.getsize(path):
        try:
            ours = (artefact_format(path) or "").startswith("heapr_")
        except HeaprError:
            ours = False
        if not ours:
            raise HeaprError(
                f"output={str(path)!r}: is not a statistics file or plan of this package, or is damaged; "
                "delete it or name another file"
            )
