# Licensed under the Apache License, Version 2.0
"""The chart of a search within a loss: what was measured at which ratio, and which of it was taken."""

from __future__ import annotations

from typing import Any

from .charts import LEFT, RIGHT, WIDTH, axis
from .svg import DARK, FAINT, INK, Canvas, n


TOP, HEIGHT = 30, 200


def search_chart(report: dict[str, Any], room: float = WIDTH) -> str:
    """Measured increase of the loss over the removed share, with errors and what was allowed; empty if nothing was searched."""
    points, bound = report.get("search"), report["config"].get("max_loss_increase")
    if not points or bound is None:
        return ""
    canvas, bottom = Canvas("search", room, "Measured increase of the loss by removed share"), TOP + HEIGHT
    most = axis(
        canvas, TOP, bottom, max(bound, *(p["increase"] + p["error"] for p in points)), lambda loss: f"{loss:.2g}"
    )

    def x_of(ratio: float) -> float:
        return LEFT + ratio * (room - LEFT - RIGHT)

    def y_of(loss: float) -> float:
        return bottom - HEIGHT * max(loss, 0.0) / most

    for step in range(6):
        canvas.line(x_of(step / 5), bottom, x_of(step / 5), bottom + 4, INK)
        canvas.write(x_of(step / 5), bottom + 18, str(20 * step), "middle")
    canvas.write((LEFT + room - RIGHT) / 2, bottom + 36, "% of the routed atomic experts removed", "middle")
    canvas.write(16, TOP + HEIGHT / 2, "loss +, nats a token", "middle", turned=True)
    canvas.line(LEFT, y_of(bound), room - RIGHT, y_of(bound), INK, 1.2, "5 3")
    canvas.write(LEFT + 4, y_of(bound) - 5, f"allowed: {bound:g}", size=11)
    for point in points:
        x, low, high = x_of(point["ratio"]), *(point["increase"] + sign * point["error"] for sign in (-1, 1))
        canvas.path(
            f"M{n(x - 3)} {n(y_of(low))}h6M{n(x)} {n(y_of(low))}V{n(y_of(high))}M{n(x - 3)} {n(y_of(high))}h6",
            stroke=FAINT,
        )
    canvas.marks("ring", [(x_of(point["ratio"]), y_of(point["increase"])) for point in points], 4.5, DARK)
    for point in points:
        if point["ratio"] == report["removed"]["ratio"]:
            place = x_of(point["ratio"]), y_of(point["increase"])
            canvas.marks("cross", [place], 8, INK)
            label = f"taken: {point['ratio']:.1%}, {point['increase']:+.4f}"
            # Above all marks, where nothing else is, and on the side that has room.
            canvas.line(place[0], TOP - 8, place[0], place[1] - 9, FAINT, 1, "1 3")
            is_left = place[0] > (LEFT + room - RIGHT) / 2
            canvas.write(place[0] + (8 if is_left else -8), TOP - 12, label, "end" if is_left else "start")
    canvas.height = bottom + 44
    return canvas.text()
