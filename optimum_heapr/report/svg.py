# Licensed under the Apache License, Version 2.0
"""Drawing in SVG: a canvas with the few shapes that charts are made of. A few kilobytes, sharp in print, no dependency."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


INK, FAINT, GRID = "#1d2433", "#5b6475", "#d9dde4"
DARK, LIGHT = "#00224e", "#e5cf52"  # the two ends of the colour map, nearly
FONT = "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"

# cividis at 0, 0.1, …, 1 (Nuñez, Anderton, Renslow 2018): read alike with and without colour vision, and ordered in grey.
CIVIDIS = ("#00224e", "#083370", "#35456c", "#4f576c", "#666970", "#7d7c78")
CIVIDIS += ("#948e77", "#aea371", "#c8b866", "#e5cf52", "#fee838")


class Canvas:
    """Shapes one after another; `text()` is the picture.

    Args:
        name (`str`): of the picture, unlike that of others as wide on the same page: definitions are called after both.
        width (`float`): in user units; the picture scales to the place it is given.
        title (`str`): what it shows, for those who cannot see it.
        data (`dict[str, float]`, *optional*): `data-` attributes.
    """

    def __init__(self, name: str, width: float, title: str, data: dict[str, float] | None = None):
        self.name, self.width, self.height, self.title, self.data = f"{name}-{n(width)}", width, 0.0, title, data or {}
        self.parts: list[str] = []

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str, stroke: str | None = None) -> None:
        outline = f" stroke='{stroke}'" if stroke else ""
        self.parts.append(
            f"<rect x='{n(x)}' y='{n(y)}' width='{n(width)}' height='{n(height)}' fill='{fill}'{outline}/>"
        )

    def path(
        self, steps: str, fill: str = "none", stroke: str | None = None, width: float = 1, dash: str = ""
    ) -> None:
        line = f" stroke='{stroke}' stroke-width='{width:g}'" if stroke else ""
        dashes = f" stroke-dasharray='{dash}'" if dash else ""
        self.parts.append(f"<path d='{steps}' fill='{fill}'{line}{dashes}/>")

    def line(self, x: float, y: float, to_x: float, to_y: float, stroke: str = GRID, width: float = 1, dash: str = ""):
        self.path(f"M{n(x)} {n(y)}L{n(to_x)} {n(to_y)}", stroke=stroke, width=width, dash=dash)

    def write(
        self,
        x: float,
        y: float,
        text: str,
        anchor: str = "start",
        size: float = 12,
        fill: str = INK,
        turned: bool = False,
    ) -> None:
        turn = f" transform='rotate(-90 {n(x)} {n(y)})'" if turned else ""
        self.parts.append(
            f"<text x='{n(x)}' y='{n(y)}' text-anchor='{anchor}' font-size='{size:g}' fill='{fill}'{turn}>{escape(text)}</text>"
        )

    def marks(self, shape: str, places: Iterable[tuple[float, float]], radius: float, stroke: str) -> None:
        """A `cross` or a `ring` at each place."""
        r, d = n(radius), n(2 * radius)
        if shape == "cross":
            steps = [f"M{n(x - radius)} {n(y - radius)}l{d} {d}m0 -{d}l-{d} {d}" for x, y in places]
        else:
            steps = [f"M{n(x - radius)} {n(y)}a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0 -{d} 0" for x, y in places]
        if steps:
            self.path("".join(steps), stroke=stroke, width=1.3)

    def begin(self, tag: str, **attributes: str) -> None:
        given = "".join(f" {name.replace('_', '-')}='{value}'" for name, value in attributes.items())
        self.parts.append(f"<{tag}{given}>")

    def end(self, tag: str) -> None:
        self.parts.append(f"</{tag}>")

    def hatching(self, colour: str) -> str:
        """Defines a hatched fill and returns what to call it."""
        name = f"{self.name}-hatched"
        self.parts.append(
            f"<defs><pattern id='{name}' width='5' height='5' patternUnits='userSpaceOnUse' patternTransform='rotate(45)'>"
            f"<rect width='5' height='5' fill='{colour}'/><rect width='1.6' height='5' fill='{INK}'/></pattern></defs>"
        )
        return f"url(#{name})"

    def gradient(self, colours: Sequence[str]) -> str:
        """Defines a fill that goes through these colours from left to right, and returns what to call it."""
        name, last = f"{self.name}-gradient", len(colours) - 1
        stops = "".join(f"<stop offset='{i / last:g}' stop-color='{colour}'/>" for i, colour in enumerate(colours))
        self.parts.append(f"<defs><linearGradient id='{name}'>{stops}</linearGradient></defs>")
        return f"url(#{name})"

    def text(self) -> str:
        data = "".join(f" data-{name}='{n(value)}'" for name, value in self.data.items())
        return (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {n(self.width)} {n(self.height)}' role='img'"
            f' font-family="{FONT}"{data}><title>{escape(self.title)}</title>'
            f"<rect width='100%' height='100%' fill='#fff'/>{''.join(self.parts)}</svg>"
        )


def n(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def cividis(value: float) -> str:
    """The colour of a value from 0 to 1."""
    place = min(max(value, 0.0), 1.0) * (len(CIVIDIS) - 1)
    index = min(int(place), len(CIVIDIS) - 2)
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in CIVIDIS[index : index + 2]]
    return "#" + "".join(f"{round(low + (high - low) * (place - index)):02x}" for low, high in zip(*ends))
