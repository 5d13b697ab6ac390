# Licensed under the Apache License, Version 2.0
"""The charts of a report. Nothing is said by colour alone: there are marks, hatching, labels, and a table with each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from .numbers import count, layer_names
from .svg import CIVIDIS, DARK, FAINT, GRID, INK, LIGHT, Canvas, cividis, n


WIDTH, NARROW = 920, 340  # of a picture, in what it says of letters: beside other text, and on a phone
LEFT, RIGHT = 70, 14
LEVELS = 41  # of colour: cells of one level are one path


def kept_widths(report: dict[str, Any], room: float = WIDTH) -> str:
    """Heat map of the share of each expert that stays."""
    blocks = report["blocks"]
    names = layer_names([block["path"] for block in blocks])
    rows = [[width / block["width"] for width in block["widths"]] for block in blocks]
    return _heat_map(
        room,
        "widths",
        "Kept share of each expert, by layer and expert",
        names,
        rows,
        ("kept share of the expert", "0 %", "100 %"),
        crossed=[[e for e, width in enumerate(block["widths"]) if width == 0] for block in blocks],
        ringed=[block["unreached"] for block in blocks],
    )


def tokens_per_expert(report: dict[str, Any], room: float = WIDTH) -> str:
    """Heat map of the calibration tokens of each expert, on a logarithmic scale; empty if that is not known."""
    blocks = report["blocks"]
    if not all(block["tokens"] for block in blocks):
        return ""
    most = max(max(block["tokens"]) for block in blocks) or 1
    top = math.log1p(most)
    return _heat_map(
        room,
        "tokens",
        "Calibration tokens of each expert, by layer and expert",
        layer_names([block["path"] for block in blocks]),
        [[math.log1p(tokens) / top for tokens in block["tokens"]] for block in blocks],
        ("calibration tokens (log)", "0", count(most)),
        crossed=[],
        ringed=[block["unreached"] for block in blocks],
    )


def kept_by_layer(report: dict[str, Any], room: float = WIDTH) -> str:
    """Columns of the kept share of each layer, with the quartiles of its experts."""
    blocks = report["blocks"]
    shares = [sum(block["widths"]) / (block["width"] * len(block["widths"])) for block in blocks]
    ranges = [[quartile / block["width"] for quartile in _quartiles(block["widths"])] for block in blocks]
    names = layer_names([block["path"] for block in blocks])
    title = "Kept share of each layer"
    return _columns(room, "kept", title, names, [("kept", shares)], lambda value: f"{100 * value:.0f} %", 1.0, ranges)


def loss_by_layer(report: dict[str, Any], room: float = WIDTH) -> str:
    """Columns of the estimated increase of the loss of each layer."""
    blocks = report["blocks"]
    values = [max(block["estimated_loss_increase"], 0.0) for block in blocks]
    names = layer_names([block["path"] for block in blocks])
    title = "Estimated increase of the loss by layer, nats a token"
    return _columns(room, "loss", title, names, [("estimate", values)], lambda value: f"{value:.2g}")


def compensated_errors(report: dict[str, Any], room: float = WIDTH) -> str:
    """Columns of the error of the experts' outputs with and without compensation; empty where there was none."""
    found = [(block["path"], block["compensation"]) for block in report["blocks"] if "compensation" in block]
    if not found:
        return ""
    before, after = [done["before"] for _, done in found], [done["after"] for _, done in found]
    series = [("plain removal", before), ("compensated", after)]
    title = "Relative squared error of what was cut, by layer"
    return _columns(
        room, "errors", title, layer_names([path for path, _ in found]), series, lambda value: f"{value:.2g}"
    )


def importance_histogram(report: dict[str, Any], room: float = WIDTH) -> str:
    """What stays and what goes over the importance, with the line of the cut; empty if it is not known."""
    found = report["importance"]
    if not found or not found["edges"]:
        return ""
    is_log, edges = found["scale"] == "log", found["edges"]
    place = math.log10 if is_log else float
    low, high = place(edges[0]), place(edges[-1])
    canvas = Canvas("importance", room, "Importance of the atomic experts that stay and that go")
    top, height = 38, 200
    bottom = top + height
    most = max(kept + removed for kept, removed in zip(found["kept"], found["removed"])) or 1
    step = (room - LEFT - RIGHT) / len(found["kept"])

    def x_of(value: float) -> float:
        return LEFT + (place(value) - low) / (high - low) * (room - LEFT - RIGHT)

    most = axis(canvas, top, bottom, most, _short)
    hatched = canvas.hatching(LIGHT)
    for index, (kept, removed) in enumerate(zip(found["kept"], found["removed"])):
        x, cut = LEFT + index * step, bottom - height * removed / most
        if removed:
            canvas.rectangle(x, cut, step - 0.6, bottom - cut, hatched, INK)
        if kept:
            canvas.rectangle(x, cut - height * kept / most, step - 0.6, height * kept / most, DARK)
    for value, label in ticks(edges[0], edges[-1], is_log):
        canvas.line(x_of(value), bottom, x_of(value), bottom + 4, INK)
        canvas.write(x_of(value), bottom + 18, label, "middle")
    scale = "log scale" if is_log else "linear scale"
    canvas.write((LEFT + room) / 2, bottom + 36, f"importance, {report['config']['criterion']} ({scale})", "middle")
    canvas.write(16, (top + bottom) / 2, "atomic experts", "middle", turned=True)
    if found["cut"] is not None and edges[0] <= found["cut"] <= edges[-1]:
        x = x_of(found["cut"])
        canvas.line(x, 26, x, bottom, INK, 1.6, "5 3")
        canvas.write(min(max(x, LEFT + 240), room - 70), 21, f"cut at {found['cut']:.2g}", "middle")
    _legend(canvas, [("removed", hatched), ("kept", DARK)], 10)
    canvas.height = bottom + 44
    return canvas.text()


def _heat_map(
    room: float,
    name: str,
    title: str,
    names: Sequence[str],
    rows: Sequence[Sequence[float]],
    legend: tuple[str, str, str],
    crossed: Sequence[Sequence[int]],
    ringed: Sequence[Sequence[int]],
) -> str:
    """Layers from top to bottom, experts from left to right, values from 0 to 1."""
    experts, top = max(map(len, rows)), 8
    cell = (room - LEFT - RIGHT) / experts
    height = min(max(cell, 8.5), 26)
    bottom = top + height * len(rows)
    data = {"left": LEFT, "top": top, "cell": cell, "row": height}
    canvas = Canvas(name, room, title, data)
    levels: dict[int, list[str]] = {}
    wide = n(cell + 0.5)  # over the edge of the next, or roundings leave seams
    for index, values in enumerate(rows):
        for expert, value in enumerate(values):
            x, y = n(LEFT + expert * cell), n(top + index * height)
            step = f"M{x} {y}h{wide}v{n(height)}h-{wide}z"
            levels.setdefault(round(min(max(value, 0.0), 1.0) * (LEVELS - 1)), []).append(step)
    canvas.begin("g", shape_rendering="crispEdges")
    for level, steps in sorted(levels.items()):
        canvas.path("".join(steps), fill=cividis(level / (LEVELS - 1)))
    canvas.end("g")
    radius, used = min(cell, height) * 0.3, []
    for shape, marked, meaning in (("cross", crossed, "nothing kept"), ("ring", ringed, "no calibration token")):
        places: dict[bool, list[tuple[float, float]]] = {False: [], True: []}  # by whether the cell is light
        for index, found in enumerate(marked):
            for expert in found:
                place = (LEFT + (expert + 0.5) * cell, top + (index + 0.5) * height)
                places[rows[index][expert] > 0.5].append(place)
        for stroke, chosen in (("#fff", places[False]), (INK, places[True])):
            canvas.marks(shape, chosen, radius, stroke)
        if any(places.values()):
            used.append((shape, meaning))
    every = next((step for step in (1, 2, 4, 5, 10, 20) if step * height >= 13), 40)
    for index in range(0, len(rows), every):
        canvas.write(LEFT - 8, top + (index + 0.5) * height + 4, names[index][-8:], "end")
    every = next((step for step in (1, 2, 4, 8, 16, 32, 64) if step * cell >= 22), 128)
    for expert in range(0, experts, every):
        canvas.write(LEFT + (expert + 0.5) * cell, bottom + 16, str(expert), "middle")
    canvas.write((LEFT + room - RIGHT) / 2, bottom + 34, "expert", "middle")
    canvas.write(16, (top + bottom) / 2, "layer", "middle", turned=True)

    y, bar = bottom + 50, LEFT + 222
    canvas.write(LEFT, y + 11, legend[0])
    if is_narrow := room < WIDTH:
        y, bar = y + 20, LEFT + 26
    canvas.write(bar - 8, y + 11, legend[1], "end")
    canvas.rectangle(bar, y, 180, 13, canvas.gradient(CIVIDIS), GRID)
    canvas.write(bar + 188, y + 11, legend[2])
    for place, (shape, meaning) in enumerate(used):
        x, y = (LEFT, y + 20) if is_narrow else (LEFT + 490 + 150 * place, y)
        canvas.rectangle(x, y, 13, 13, CIVIDIS[0])
        canvas.marks(shape, [(x + 6.5, y + 6.5)], 3.4, "#fff")
        canvas.write(x + 20, y + 11, meaning)
    canvas.height = y + 22
    return canvas.text()


def _columns(
    room: float,
    name: str,
    title: str,
    names: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    write: Callable[[float], str],
    most: float | None = None,
    ranges: Sequence[tuple[float, float]] = (),
) -> str:
    """One group of columns a layer; the first of two series is hatched."""
    canvas = Canvas(name, room, title)
    top, height = 30, 180
    bottom = top + height
    most = most or max(max(values) for _, values in series) or 1.0
    step = (room - LEFT - RIGHT) / len(names)
    width = min(step * 0.72 / len(series), 60)
    fills = [DARK] if len(series) == 1 else [canvas.hatching(LIGHT), DARK]
    most = axis(canvas, top, bottom, most, write)
    for index in range(len(names)):
        middle = LEFT + (index + 0.5) * step
        for place, (_, values) in enumerate(series):
            x = middle + (place - len(series) / 2) * width
            tall = height * values[index] / most
            outline = INK if fills[place] != DARK else None
            canvas.rectangle(x, bottom - tall, width * 0.96, tall, fills[place], outline)
            if width >= 34:
                canvas.write(x + width / 2, bottom - tall - 5, write(values[index]), "middle", 11, FAINT)
        if ranges:
            low, high = (bottom - height * share / most for share in ranges[index])
            x = middle + width / 2 + min(step * 0.1, 8)
            canvas.path(f"M{n(x - 2)} {n(low)}h4M{n(x)} {n(low)}V{n(high)}M{n(x - 2)} {n(high)}h4", stroke=FAINT)
    every = next((k for k in (1, 2, 4, 5, 10, 20) if k * step >= 6 + 7 * max(len(label[-8:]) for label in names)), 40)
    for index in range(0, len(names), every):
        canvas.write(LEFT + (index + 0.5) * step, bottom + 16, names[index][-8:], "middle")
    canvas.write((LEFT + room - RIGHT) / 2, bottom + 34, "layer", "middle")
    if len(series) > 1:
        _legend(canvas, list(zip([label for label, _ in series], fills)), 10)
    elif ranges:
        canvas.path("M72 11h6M75 11v12M72 23h6", stroke=FAINT)
        canvas.write(LEFT + 14, 21, "half of its experts lie between the ends")
    canvas.height = bottom + 42
    return canvas.text()


def axis(canvas: Canvas, top: float, bottom: float, most: float, write: Callable[[float], str]) -> float:
    """Lines at round values from 0 up; returns the value of the uppermost, which is `most` or a little more."""
    power = 10 ** math.floor(math.log10(most / 5))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * 5 >= most * 0.999)
    steps = math.ceil(most / step - 0.001)
    for index in range(steps + 1):
        y = bottom - (bottom - top) * index / steps
        canvas.line(LEFT, y, canvas.width - RIGHT, y, INK if index == 0 else GRID)
        canvas.write(LEFT - 8, y + 4, write(step * index), "end")
    return step * steps


def _legend(canvas: Canvas, entries: Sequence[tuple[str, str]], y: float) -> None:
    x = LEFT + 2.0
    for label, fill in entries:
        canvas.rectangle(x, y, 13, 13, fill, INK)
        canvas.write(x + 20, y + 11, label)
        x += 46 + 7 * len(label)


def _short(value: float) -> str:
    return f"{value / 1000:g} k" if 10_000 <= value < 1e6 else count(value)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ticks(low: float, high: float, is_log: bool) -> list[tuple[float, str]]:
    """Places of an axis that get a label, and these: six at equal distances, or powers of ten."""
    if not is_log:
        return [(low + (high - low) * i / 5, f"{low + (high - low) * i / 5:.3g}") for i in range(6)]
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, -(-(last - first) // 8))
    return [(10.0**power, f"1e{power}") for power in range(first, last + 1, every)]
