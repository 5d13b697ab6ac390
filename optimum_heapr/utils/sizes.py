# Licensed under the Apache License, Version 2.0
"""Numbers and sizes in bytes as people write them."""

from __future__ import annotations

import re

from .errors import HeaprError


_UNITS = {"": 1, "b": 1, **{f"{k}b": 1000**n for n, k in enumerate("kmgt", 1)}}
_UNITS |= {f"{k}ib": 1024**n for n, k in enumerate("kmgt", 1)}


_FACTORS = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def written_number(text: str) -> int | float | None:
    """The number of `"25%"`, `"8M"`, `"1.5 B"` or `"18k"`; `None` if it is something else, a plain number among that."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([%kmbt])\s*", text.lower())
    if match is None:
        return None
    if match[2] == "%":
        return float(match[1]) / 100
    value = float(match[1]) * _FACTORS[match[2]]
    return round(value) if abs(value - round(value)) < 1e-6 else value


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
