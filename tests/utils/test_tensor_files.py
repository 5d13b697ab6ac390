# Licensed under the Apache License, Version 2.0
"""Our reader and writer of safetensors files against the library's."""

import ctypes
import mmap
import os
import time

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_heapr.utils.errors import HeaprError
from optimum_heapr.utils.tensor_files import _DTYPES, TensorReader, write_tensors


def tensors_of_all_dtypes() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index, dtype in enumerate(_DTYPES.values()):
        bytes_ = torch.randint(0, 2, (6 * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        tensors[f"b{index}.weight"] = bytes_.view(dtype).view(2, 3)
        tensors[f"a.{index}"] = bytes_.view(dtype)[:1].clone()
    tensors["empty"] = torch.empty(4, 0)
    tensors["scalar"] = torch.tensor(1.5)
    tensors["naïve"] = torch.ones(3)
    return tensors


def write(path, tensors, metadata=None):
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(path, shapes, lambda name: iter([tensors[name]]), metadata or {"format": "pt"})


def test_written_file_is_the_librarys_byte_for_byte(tmp_path):
    tensors = tensors_of_all_dtypes()
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    write(tmp_path / "ours.safetensors", tensors)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_single_element_may_have_any_stride(tmp_path, dtype):
    """As the bias of the only atomic expert of an expert, taken out of gate and up that take turns."""
    whole = torch.arange(4, dtype=dtype)
    write(tmp_path / "ours.safetensors", {"bias": whole[1::2][:1], "row": whole.view(2, 2)[:, 1:][1:]})
    found = load_file(tmp_path / "ours.safetensors")
    assert found["bias"].tolist() == [1] and found["row"].tolist() == [[3]]


def test_tensor_may_be_written_in_parts(tmp_path):
    whole = torch.randn(4, 3)
    shapes = {"t": (whole.dtype, (4, 3))}
    write_tensors(tmp_path / "parts.safetensors", shapes, lambda name: iter(whole.split(1)), {"format": "pt"})
    assert torch.equal(load_file(tmp_path / "parts.safetensors")["t"], whole)


def test_reads_what_the_library_wrote_whole_or_by_row(tmp_path):
    tensors = tensors_of_all_dtypes()
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:10]}, tmp_path / "1.safetensors")
    save_file({name: tensors[name] for name in names[10:]}, tmp_path / "2.safetensors")
    reader = TensorReader([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert set(reader.tensors) == set(names)
    for name, tensor in tensors.items():
        read = reader.read(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert read.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    row = reader.read("b11.weight", 1)
    assert torch.equal(row, tensors["b11.weight"][1:2])


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, (4).to_bytes(8, "little") + b"null"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(HeaprError, match="is not a safetensors file"):
        TensorReader([tmp_path / "model.safetensors"])


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    reader = TensorReader([path])
    with pytest.raises(HeaprError, match="ends within t; download it again"):
        reader.read("t")


def share_in_page_cache(path, info) -> float:
    """How much of a tensor the system has in memory, which looking does not change: `mincore(2)`."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        address = numpy.frombuffer(mapped, dtype=numpy.uint8).ctypes.data
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        assert libc.mincore(address, len(mapped), pages) == 0, os.strerror(ctypes.get_errno())
    of_tensor = pages[info.start // mmap.PAGESIZE : -(-(info.start + info.size) // mmap.PAGESIZE)]
    return sum(page & 1 for page in of_tensor) / len(of_tensor)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no posix_fadvise")
def test_what_is_read_ahead_is_in_the_page_cache_and_nothing_else(tmp_path):
    path, tensors = tmp_path / "model.safetensors", {name: torch.rand(1 << 20) for name in "abcd"}  # 4 MiB each
    write(path, tensors)
    reader = TensorReader([path])

    def shares():
        return {name: share_in_page_cache(path, info) for name, info in reader.tensors.items()}

    with open(path, "rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = shares()
    if before["b"] > 0.5:
        pytest.skip("the file system of the temporary folder keeps its files in memory")
    reader.read_ahead(["c", "b"])
    deadline = time.monotonic() + 60
    while min(shares()[name] for name in "bc") < 0.99:  # perhaps not the last page
        assert time.monotonic() < deadline
        time.sleep(0.01)
    after = shares()
    assert after["a"] < before["a"] + 0.5 and after["d"] < before["d"] + 0.5  # the system may bring in a little more
