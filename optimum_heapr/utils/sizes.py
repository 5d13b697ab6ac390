# Licensed under the Apache License, Version 2.0
"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

from .errors import HeaprError


_UNITS = {"": 1, "b": 1, **{f"{k}b": 1000**n for n, k in enumerate("kmgt", 1)}}
_UNITS |= {f"{k}ib": 1024**n for n, k in enumerate("kmgt", 1)}


def parse_size(name: str, text: str) -> int:
    """Bytes of `"12GB"`, `"11.5 GiB"` or `"12000000000"`.

    Args:
        name (`str`): of the option, for the message.
        text (`str`): a number with a unit or none: `KB`, `MB`, `GB`, `TB` in powers of 1000, `KiB` to `TiB` of 1024.

    Raises:
        HeaprError: if it is not such a size, or less than a byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS or (size := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise HeaprError(
            f"{name}={text!r}: must be a number of bytes, or one with a unit such as 12GB (10^9 bytes) or 11.5GiB (2^30)"
        )
    return size
