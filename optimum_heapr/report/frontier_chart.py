# Licensed under the Apache License, Version 2.0
"""The chart of a frontier: loss against bytes, one line a method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .charts import LEFT, RIGHT, WIDTH, ticks
from .numbers import count, size
from .svg import DARK, GRID, INK, Canvas, n


DECADES = 3  # of loss; what is below would be noise
COLOURS = (DARK, "#b1662b", "#3a7d7c", "#7d7c78")
DASHES = ("", "7 3", "2 3", "9 3 2 3")  # for who sees no colours
TOP, HEIGHT = 20, 300

Points = Sequence[dict[str, Any]]


def frontier_charts(points: Points, chosen: dict[str, Any] | None = None) -> dict[str, str]:
    """Charts as SVG, by the name of a file without its ending.

    Estimates of different criteria do not compare, so without measurements there is a chart for each criterion.

    Args:
        points (`Sequence[dict]`): of [`~optimum_heapr.frontier.FrontierPoint.to_dict`].
        chosen (`dict`, *optional*): one of them, to be marked.
    """
    if any(point["calibrated"] is not None for point in points):
        return {"frontier": _chart("frontier", "increase of the loss, corrected by what was measured", points, chosen)}
    charts = {}
    for criterion in dict.fromkeys(point["criterion"] for point in points):
        own = [point for point in points if point["criterion"] == criterion]
        name = f"frontier-{criterion}"
        charts[name] = _chart(name, f"estimated increase of the loss, criterion {criterion}", own, None)
    return charts


def _chart(name: str, title: str, points: Points, chosen: dict[str, Any] | None) -> str:
    canvas = Canvas(name, WIDTH, f"Size against {title}")
    value = "num_bytes" if all(point["num_bytes"] is not None for point in points) else "parameters"
    losses = [loss for loss in map(_loss, points) if loss and loss > 0]
    if not losses:
        canvas.write(LEFT, TOP, "no plan raises the loss")
        canvas.height = 2.0 * TOP
        return canvas.text()
    low, high = max(min(losses), max(losses) / 10**DECADES) / 1.2, max(losses) * 1.2
    left, right = min(point[value] for point in points), max(point[value] for point in points)
    bottom, span = TOP + HEIGHT, (right - left) or 1

    def place(point: dict[str, Any], loss: float) -> tuple[float, float]:
        x = LEFT + 20 + (point[value] - left) / span * (WIDTH - LEFT - RIGHT - 40)
        up = (math.log(max(loss, low)) - math.log(low)) / (math.log(high) - math.log(low))
        return x, bottom - HEIGHT * min(up, 1.0)

    for power, _ in ticks(low, high, is_log=True):
        for factor in (1, 2, 5):
            if low <= factor * power <= high:
                _, y = place(points[0], factor * power)
                canvas.line(LEFT, y, WIDTH - RIGHT, y, GRID)
                canvas.write(LEFT - 8, y + 4, f"{power:g}" if factor == 1 else "", "end")
    canvas.line(LEFT, bottom, WIDTH - RIGHT, bottom, INK)
    for step in range(6):
        at = left + span * step / 5
        x, _ = place({value: at}, high)
        canvas.line(x, bottom, x, bottom + 4, INK)
        canvas.write(x, bottom + 18, size(at) if value == "num_bytes" else count(at), "middle")
    canvas.write((LEFT + WIDTH) / 2, bottom + 36, "weights" if value == "num_bytes" else "parameters", "middle")
    canvas.write(16, TOP + HEIGHT / 2, "loss +, nats a token (log)", "middle", turned=True)
    methods = list(dict.fromkeys(map(_method, points)))
    for index, method in enumerate(methods):
        stroke, dash = style(index)
        curve = [point for point in points if _method(point) == method]
        corners = [place(point, _loss(point)) for point in curve if _loss(point) is not None]
        canvas.path("M" + "L".join(f"{n(x)} {n(y)}" for x, y in corners), stroke=stroke, width=2, dash=dash)
        measured = [place(point, point["measured"]) for point in curve if point["measured"] is not None]
        canvas.marks("ring", measured, 4.5, stroke)
        y = bottom + 56 + 18 * index
        canvas.line(LEFT, y, LEFT + 40, y, stroke, 2, dash)
        canvas.write(LEFT + 50, y + 4, method + ("; rings are measured" if measured else ""))
    canvas.height = bottom + 56 + 18 * len(methods)
    if chosen is not None:
        canvas.marks("cross", [place(chosen, _loss(chosen)), (LEFT + 20, canvas.height)], 8, INK)
        label = f"chosen: {_method(chosen)}, {chosen['ratio']:.1%} removed, +{_loss(chosen):.4f}"
        canvas.write(LEFT + 50, canvas.height + 4, label)
        canvas.height += 18
    return canvas.text()


def style(index: int) -> tuple[str, str]:
    """Colour and dash of a line: of the first four both differ, and no two of sixteen are the same."""
    turn, place = divmod(index, len(COLOURS))
    return COLOURS[place], DASHES[(place + turn) % len(DASHES)]


def _method(point: dict[str, Any]) -> str:
    number = point.get("num_experts")
    return f"{point['criterion']}, {point['layout']}" + ("" if number is None else f", {number} experts")


def _loss(point: dict[str, Any]) -> float | None:
    """What is drawn of a point: what was measured, or else the best estimate."""
    return next((point[name] for name in ("measured", "calibrated", "estimated") if point[name] is not None), None)
