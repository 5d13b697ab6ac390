# Licensed under the Apache License, Version 2.0
"""A report as one HTML file that needs nothing beside it: no network, no fonts, no library. Everything shown is escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import escape
from importlib.resources import files
from os.path import commonprefix
from typing import Any

from . import charts
from .markdown import summary, title
from .numbers import change, count, signed, size
from .search_chart import search_chart
from .tables import Table, comparison, compensation, coverage, importance, layers, measured_on, reconstruction, search


_ROOMS = {"roomy": charts.WIDTH, "narrow": charts.NARROW}


def report_html(report: dict[str, Any]) -> str:
    """The whole report; see [`~optimum_heapr.report.content.build_report`]."""
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    sections = [
        f"<header><h1>{escape(title(report))}</h1><p>{_inline(summary(report))}</p></header>",
        _tiles(report),
        _section(comparison(report)),
        _section(
            search(report),
            _figure(search_chart, report, "What was measured, with one standard error; the cross is what was taken."),
        ),
        _section(
            layers(report),
            _figure(
                charts.kept_widths,
                report,
                "How much of each expert stays. Point at a cell for its numbers.",
                "heat",
            ),
            _figure(charts.kept_by_layer, report, "What stays of each layer."),
            _figure(charts.loss_by_layer, report, "What its pruning is estimated to cost, nats a token."),
        ),
        _section(
            importance(report),
            _figure(charts.importance_histogram, report, "Importance of all routed atomic experts, and the cut."),
        ),
        _section(
            coverage(report),
            _figure(
                charts.tokens_per_expert,
                report,
                "How many calibration tokens the router gave to each expert. Experts with few have rough scores.",
                "heat",
            ),
        ),
        _section(
            compensation(report),
            _figure(charts.compensated_errors, report, "What compensation makes up for, by layer."),
        ),
        _section(reconstruction(report)),
        _samples(report),
        f"<section><h2>Recipe</h2><pre>{escape(_recipe(report))}</pre></section>",
    ]
    data = [{key: block[key] for key in ("path", "width", "widths", "tokens")} for block in report["blocks"]]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        # An icon of its own, or the browser asks for one.
        f"<link rel='icon' href='data:,'><title>{escape(title(report))}</title><style>{style}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main><script type='application/json' id='blocks'>{_script_safe(data)}</script>"
        f"<script>{script}</script></body></html>\n"
    )


def _tiles(report: dict[str, Any]) -> str:
    """The few figures that everybody looks for."""
    tiles = [(f"{report['removed']['ratio']:.1%}", "of the routed atomic experts removed", "")]
    if "size" in report:
        before, after = report["size"]["before"], report["size"]["after"]
        tiles.append((count(after["parameters"]), "parameters", change(before["parameters"], after["parameters"])))
        if after["active_parameters"] is not None:
            active = change(before["active_parameters"], after["active_parameters"])
            tiles.append((count(after["active_parameters"]), "active a token", active))
        tiles.append(
            (size(after["weight_bytes"]), "of weights", change(before["weight_bytes"], after["weight_bytes"]))
        )
    loss = report["loss"]
    if "measured" in loss:
        measured = loss["measured"]
        text = f"± {measured['increase_standard_error']:.4f}; estimated {signed(loss['estimated_increase'])}"
        tiles.append((signed(measured["increase"]), "loss, nats a token, measured", text))
    else:
        tiles.append((signed(loss["estimated_increase"]), "loss, nats a token, estimated", "not measured"))
    shown = (
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span><small>{escape(note)}</small></div>"
        for value, name, note in tiles
    )
    return f"<section class='tiles'>{''.join(shown)}</section>"


def _section(table: Table, *figures: str) -> str:
    if not table.rows:
        return ""
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in table.header)
    body = "".join(
        "<tr>"
        + f"<th scope='row'>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    made = f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    if figures and len(table.rows) > 12:
        made = f"<details><summary>The numbers of all {len(table.rows)} rows</summary>{made}</details>"
    notes = "".join(f"<p class='note'>{_inline(note)}</p>" for note in table.notes)
    return f"<section><h2>{escape(table.title)}</h2>{''.join(figures)}{made}{notes}</section>"


def _figure(chart: Callable[..., str], report: dict[str, Any], caption: str, kind: str = "") -> str:
    """A chart, drawn for a page and for a phone, of which the style sheet shows the one that there is room for."""
    if not chart(report):
        return ""
    drawn = "".join(f"<div class='{name}'>{chart(report, room)}</div>" for name, room in _ROOMS.items())
    readout = "<output aria-live='polite'></output>" if kind else ""
    return f"<figure class='{kind}'>{drawn}<figcaption>{escape(caption)} {readout}</figcaption></figure>"


def _samples(report: dict[str, Any]) -> str:
    if not report.get("samples"):
        return ""
    made = []
    for sample in report["samples"]:
        before, after = sample["before"], sample["after"]
        same = len(commonprefix([before, after]))
        sides = (
            f"<div><h3>{name}</h3><p>{escape(text[:same])}<mark>{escape(text[same:])}</mark></p></div>"
            for name, text in (("before", before), ("after", after))
        )
        made.append(
            f"<article><p class='prompt'>{escape(sample['prompt'])}</p><div class='sides'>{''.join(sides)}</div></article>"
        )
    where = f" Prompts are of {escape(measured_on(report))}." if "measured" in report["loss"] else ""
    return (
        "<section><h2>Completions</h2><p class='note'>Greedy, from the same prompts; underlined from where the two part."
        f"{where}</p>{''.join(made)}</section>"
    )


def _recipe(report: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(report["config"], sort_keys=False, allow_unicode=True)


def _inline(text: str) -> str:
    """Text with `code` in backticks."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _script_safe(data: Any) -> str:
    """JSON in which no tag can begin."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
