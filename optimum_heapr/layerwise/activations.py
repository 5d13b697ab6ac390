# Licensed under the Apache License, Version 2.0
"""Where the inputs of all layers for all micro-batches lie between forward and backward: on the host, then on disk."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..utils.errors import HeaprError
from ..utils.tensor_files import TensorReader, write_tensors


class ActivationStore:
    """Tensors by name, in the memory of the host up to a budget, and in files past it.

    Args:
        folder (`Path`): for the files; it exists, and whoever made it removes it.
        budget (`int`): bytes of memory.

    Attributes:
        in_memory (`int`): bytes in memory now.
        on_disk (`int`): bytes in files now.
        most_in_memory, most_on_disk (`int`): the most there were of either.
    """

    def __init__(self, folder: Path, budget: int):
        self.folder, self.budget = folder, budget
        self.in_memory = self.on_disk = self.most_in_memory = self.most_on_disk = 0
        self._held: dict[str, torch.Tensor] = {}

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Keeps a tensor, in place of one of the same name; the caller does not change it afterwards.

        Raises:
            HeaprError: if the disk is full.
        """
        self.drop(name)
        tensor = tensor.detach().to("cpu").contiguous()
        if self.in_memory + tensor.nbytes <= self.budget:
            self._held[name] = tensor
            self.in_memory += tensor.nbytes
            self.most_in_memory = max(self.most_in_memory, self.in_memory)
            return
        file = self._file(name)
        try:
            shapes = {"tensor": (tensor.dtype, tuple(tensor.shape))}
            write_tensors(file, shapes, lambda _: iter([tensor]), {})
        except OSError as error:
            file.unlink(missing_ok=True)
            raise HeaprError(
                f"activations={str(self.folder)!r}: cannot be written ({error}); make room there, name another folder, or "
                "calibrate on fewer samples"
            ) from error
        self.on_disk += file.stat().st_size
        self.most_on_disk = max(self.most_on_disk, self.on_disk)

    def get(self, name: str, device: torch.device) -> torch.Tensor:
        """A copy of a tensor, in memory of its own.

        Args:
            name (`str`): what it was put as, now or by a run that was interrupted.
            device (`torch.device`): where the copy is to be.

        Raises:
            HeaprError: if its file is missing or damaged.
        """
        if name in self._held:
            return self._held[name].to(device, copy=True)
        return TensorReader([self._file(name)]).read("tensor").to(device)

    def drop(self, name: str) -> None:
        """Forgets a tensor, if there is one of this name."""
        held = self._held.pop(name, None)
        if held is not None:
            self.in_memory -= held.nbytes
        file = self._file(name)
        if file.is_file():
            self.on_disk -= file.stat().st_size
            file.unlink()

    def _file(self, name: str) -> Path:
        return self.folder / f"{os.path.basename(name)}.safetensors"
