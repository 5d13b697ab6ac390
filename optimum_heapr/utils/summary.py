# Licensed under the Apache License, Version 2.0
"""Objects that say what they are in a few lines: as text, and in notebooks as a small table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape


WIDTH = 120  # what a line may have


class Summary:
    """Base of such objects; subclasses say what is worth a line."""

    def _summary(self) -> Mapping[str, str]:
        """What each line is about, and what it says."""
        raise NotImplementedError

    def in_words(self) -> str:
        """All of it in one line."""
        return ", ".join(f"{name}: {text}" for name, text in self._summary().items())

    def __repr__(self) -> str:
        line = f"{type(self).__name__}({self.in_words()})"
        if len(line) <= WIDTH:
            return line
        return "\n".join([type(self).__name__, *(f"  {name}: {text}" for name, text in self._summary().items())])

    def _repr_html_(self) -> str:
        return html_table(type(self).__name__, list(self._summary().items()))


def html_table(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """A table as HTML, in the style of whatever shows it; nothing in a cell is markup."""
    cells = [f"<tr>{''.join(f'<th>{escape(text)}</th>' for text in header)}</tr>"] if header else []
    cells += [f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows]
    return f"<table><caption>{escape(title)}</caption>{''.join(cells)}</table>"
