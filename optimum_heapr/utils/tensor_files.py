# Licensed under the Apache License, Version 2.0
"""Reading and writing safetensors files a piece at a time.

The safetensors library maps whole files when it reads and holds all tensors when it writes. Here a tensor, or one row
of its first dimension, is read when it is asked for, and a file is written while its tensors are made. What is written
is byte for byte what the library writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from .errors import HeaprError, reason_of


# In the order of the safetensors library, which writes tensors by falling position in it, then by name.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}


class TensorInfo(NamedTuple):
    """Where a tensor is: its dtype and shape, its file, and the position and number of its bytes there."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


class TensorReader:
    """Tensors of several safetensors files by name; nothing but the headers is kept.

    Args:
        files (`Iterable[str]`): paths of the files.

    Attributes:
        tensors (`dict[str, TensorInfo]`): by name.
        bytes_read (`int`): of tensors, until now.

    Raises:
        HeaprError: if a file is missing or is not a safetensors file.
    """

    def __init__(self, files: Iterable[str | os.PathLike]):
        self.tensors: dict[str, TensorInfo] = {}
        self.bytes_read = 0
        self._ahead = ThreadPoolExecutor(1, "read-ahead")
        for file in sorted(map(Path, files)):
            self.tensors.update(_read_header(file))

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """A tensor, or `tensor[row : row + 1]` of it, in memory of its own.

        Raises:
            HeaprError: if the file ends before the tensor does.
        """
        info = self.tensors[name]
        shape, start, size = info.shape, info.start, info.size
        if row is not None:
            size //= shape[0]
            start, shape = start + row * size, (1, *shape[1:])
        if size == 0:
            return torch.empty(shape, dtype=info.dtype)
        data = torch.empty(size, dtype=torch.uint8)
        with open(info.file, "rb") as file:
            file.seek(start)
            if file.readinto(data.numpy()) != size:
                raise HeaprError(f"model={str(info.file)!r}: ends within {name}; download it again")
        self.bytes_read += size
        return data.view(info.dtype).view(shape)

    def read_ahead(self, names: Iterable[str]) -> None:
        """Has the system bring tensors into its page cache while something else is done; where it cannot, nothing happens."""
        if not hasattr(os, "posix_fadvise"):  # as on macOS
            return
        spans: dict[Path, list[list[int]]] = {}
        for info in sorted((self.tensors[name] for name in names), key=lambda info: (info.file, info.start)):
            of_file = spans.setdefault(info.file, [])
            if of_file and of_file[-1][1] == info.start:
                of_file[-1][1] += info.size
            else:
                of_file.append([info.start, info.start + info.size])
        # In a thread: the call waits for the disk as soon as its queue is full.
        self._ahead.submit(_will_need, spans)


def write_tensors(
    path: str | os.PathLike,
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    parts: Callable[[str], Iterator[torch.Tensor]],
    metadata: dict[str, str],
) -> None:
    """Writes one safetensors file.

    Args:
        path (`str`): file to write.
        tensors (`dict`): dtype and shape of each tensor.
        parts (`Callable`): called with a name when its tensor is due; yields the tensor in parts, in the order in which
            they lie in memory. No more than one part is held at a time.
        metadata (`dict[str, str]`): written in this order; the library orders several entries at random.
    """
    names = sorted(tensors, key=lambda name: (-_RANKS[tensors[name][0]], name))
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name in names:
        dtype, shape = tensors[name]
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            size = sum(_write(file, part.to(tensors[name][0])) for part in parts(name))
            expected = header[name]["data_offsets"]
            if size != expected[1] - expected[0]:
                raise RuntimeError(f"{name}: {size} bytes made, {expected[1] - expected[0]} announced")


def _will_need(spans: dict[Path, list[list[int]]]) -> None:
    for file, of_file in spans.items():
        with open(file, "rb") as stream:
            for start, end in of_file:
                os.posix_fadvise(stream.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)


def _write(file: BinaryIO, tensor: torch.Tensor) -> int:
    if tensor.numel():
        # A single element is contiguous whatever its stride, and bytes can be seen only where that is 1.
        flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
        file.write(flat.view(torch.uint8).numpy())
    return tensor.numel() * tensor.element_size()


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= file.stat().st_size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        first = 8 + length
        header.pop("__metadata__", None)
        return {
            name: TensorInfo(
                _DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                file,
                first + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise HeaprError(
            f"model={str(file)!r}: is not a safetensors file of known dtypes ({reason_of(error)})"
        ) from error


def checkpoint_files(model: str, **hub_options: Any) -> list[str]:
    """The safetensors files of a model: of a folder, or of a repository on the Hub, which is downloaded if need be.

    Args:
        model (`str`): a folder, or the name of a repository.
        hub_options: `revision`, `token`, `cache_dir`, `subfolder`.

    Raises:
        HeaprError: if it has none.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    quiet = {"_raise_exceptions_for_missing_entries": False, **hub_options}
    single = cached_file(model, SAFE_WEIGHTS_NAME, **quiet)
    if single:
        return [single]
    index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME, **quiet)
    if not index:
        raise HeaprError(f"model={model!r}: has no {SAFE_WEIGHTS_NAME}; only safetensors can be cut file by file")
    return get_checkpoint_shard_files(model, index, **hub_options)[0]
