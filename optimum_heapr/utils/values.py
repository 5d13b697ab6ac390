# Licensed under the Apache License, Version 2.0
"""Artefacts as values: equal if what they hold is equal, tensors bit for bit"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .summary import Summary


class TensorValue(Summary):
    """Base of data classes that hold tensors, whose own `==` would ask a tensor for one truth value.

    What says how an object came to be, and not what it is, is named in `_NOT_COMPARED`. Such objects are not hashable.
    """

    _NOT_COMPARED: tuple[str, ...] = ()
    __hash__ = None

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        names = [part.name for part in dataclasses.fields(self) if part.name not in self._NOT_COMPARED]
        return all(equal(getattr(self, name), getattr(other, name)) for name in names)


def equal(first: Any, second: Any) -> bool:
    """Whether two values are equal: tensors or arrays in type, shape and every element, containers in all that they hold."""
    if hasattr(first, "dtype") or hasattr(second, "dtype"):
        alike = type(first) is type(second) and first.dtype == second.dtype and first.shape == second.shape
        return alike and bool((first == second).all())
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple) and type(first) is type(second):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def are_finite(values: Any) -> bool:
    """Whether no element of an array, or of a tensor on the CPU, is infinite or NaN."""
    try:
        return bool(np.isfinite(np.asarray(values)).all())
    except TypeError:  # NumPy has no bfloat16; nothing of ours is stored in it, but may be by others
        return bool(values.isfinite().all())
