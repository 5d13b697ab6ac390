# Licensed under the Apache License, Version 2.0
"""A report as Markdown."""

from __future__ import annotations

from typing import Any

from ..utils.companions import CHART_NAME
from .tables import Table, report_tables


def report_markdown(report: dict[str, Any]) -> str:
    """The whole report; the heat map is the file `kept_widths.svg` beside it."""
    sections = [f"# {title(report)}", summary(report), f"![Kept share of each expert]({CHART_NAME})"]
    sections += [_markdown_table(table) for table in report_tables(report)]
    if report.get("samples"):
        sections.append("## Completions\n\nGreedy, from the same prompts.")
        for sample in report["samples"]:
            parts = (f"**{name}**\n\n{_fenced(sample[name])}" for name in ("prompt", "before", "after"))
            sections.append("\n\n".join(parts))
    return "\n\n".join(sections) + "\n"


def title(report: dict[str, Any]) -> str:
    return f"{report['model']} without {report['removed']['ratio']:.1%} of its routed atomic experts"


def summary(report: dict[str, Any]) -> str:
    """How it was pruned, in a sentence or two."""
    config, data, versions = report["config"], report["calibration"], report["versions"]
    text = (
        f"Ranked by `{config['criterion']}`, allocation `{config['allocation']}`, layout `{config['layout']}`"
        f"{', compensated' if config['compensate'] else ''}."
    )
    if data:
        text += f" Calibrated on {data['num_tokens']:,} tokens in {data['num_samples']:,} samples of {data['source']}."
    return text + " Made with " + ", ".join(f"{package} {version}" for package, version in versions.items()) + "."


def _markdown_table(table: Table) -> str:
    lines = ["| " + " | ".join(_cell(text) for text in table.header) + " |"]
    lines.append("|---|" + "---:|" * (len(table.header) - 1))
    lines += ["| " + " | ".join(_cell(text) for text in row) + " |" for row in table.rows]
    return "\n\n".join([f"## {table.title}", "\n".join(lines), *table.notes])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _fenced(text: str) -> str:
    """A code block that the text, whatever is in it, cannot close."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
