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
        self._bound = 0  # what there is at most: what is gone is looked for only where this is more than ever
        for tensor in tensors:
            self._see(tensor)
        self.most = self.now()

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None or known[0].expired():
            self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self._bound += storage.nbytes()

    def now(self) -> int:
        self._storages = {key: kept for key, kept in self._storages.items() if not kept[0].expired()}
        self._bound = sum(size for _, size in self._storages.values())
        return self._bound

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        if self._bound > self.most:
            self.most = max(self.most, self.now())
        return result
