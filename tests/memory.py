# Licensed under the Apache License, Version 2.0
"""How much memory tensors take while something runs, counted and not measured: the same on any machine."""

from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that are there, as far as they were given or an operation gave them.

    Args:
        tensors (`Iterable[torch.Tensor]`): that are there before.

    Attributes:
        most (`int`): at any time.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()):
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in tensors:
            self._see(tensor)
        self.most = self.now()

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def now(self) -> int:
        self._storages = {key: kept for key, kept in self._storages.items() if not kept[0].expired()}
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        self.most = max(self.most, self.now())
        return result
