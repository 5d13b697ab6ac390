# Licensed under the Apache License, Version 2.0
"""Numbers as people read them, and what layers are called."""

from __future__ import annotations

import re


def count(value: float | None) -> str:
    """`12.9 M`, `30.5 B`; up to a hundred thousand every digit."""
    if value is None:
        return "?"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes in powers of 1000, as files are sold and shown on the Hub."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} B"


def change(before: float | None, after: float | None) -> str:
    """`-25.1 %`, or nothing where it has no meaning."""
    if not before or after is None:
        return ""
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")


def signed(value: float, digits: int = 4) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def layer_names(paths: list[str]) -> list[str]:
    """The numbers of the layers, if the paths have one each that differ; else the paths."""
    numbers = [re.findall(r"\.(\d+)\.", f".{path}.") for path in paths]
    if all(numbers) and len({found[0] for found in numbers}) == len(paths):
        return [found[0] for found in numbers]
    return paths
