# Licensed under the Apache License, Version 2.0
"""The chart of a search within a loss: what was measured at which ratio, and which of it was taken."""

from __future__ import annotations

from typing import Any

from .charts import LEFT, RIGHT, WIDTH, axis
from .svg import DARK, FAINT, INK, Canvas, n


TOP, HEIGHT = 30, 200


def search_chart(report: dict[str, Any]) -> str:
    """Measured increase of the loss over the removed share, with errors and what was allowed; empty if nothing was searched."""
    points, bound = report.get("search"), report["config"].get("max_loss_increase")
    if not points or bound is None:
        return ""
    canvas, bottom = Canvas("search", WIDTH, "Measured increase of the loss by removed share"), TOP + HEIGHT
    most = axis(
        canvas, TOP, bottom, max(bound, *(p["increase"] + p["error"] for p in points)), lambda loss: f"{loss:.2g}"
    )

    def x_of(ratio: float) -> float:
        return LEFT + ratio * (WIDTH - LEFT - RIGHT)

    def y_of(loss: float) -> float:
        return bottom - HEIGHT * max(loss, 0.0) / most

    for step in range(6):
        canvas.line(x_of(step / 5), bottom, x_of(step / 5), bottom + 4, INK)
        canvas.write(x_of(step / 5), bottom + 18, f"{20 * step} %", "middle" if step < 5 else "end")
    canvas.write((LEFT + WIDTH - RIGHT) / 2, bottom + 36, "routed atomic experts removed", "middle")
    canvas.write(16, TOP + HEIGHT / 2, "loss +, nats a token", "middle", turned=True)
    canvas.line(LEFT, y_of(bound), WIDTH - RIGHT, y_of(bound), INK, 1.2, "5 3")
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
            canvas.write(place[0] + 12, place[1] + 4, f"taken: {point['ratio']:.1%}, {point['increase']:+.4f}")
    canvas.height = bottom + 44
    return canvas.text()
