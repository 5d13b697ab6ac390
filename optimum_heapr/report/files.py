# Licensed under the Apache License, Version 2.0
"""Reports on disk: `report.json`, and what is rendered from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..utils.companions import CHART_NAME, REPORT_NAME, REPORT_PAGE_NAME, REPORT_TEXT_NAME
from ..utils.errors import HeaprError, reason_of
from ..utils.files import replace_file, write_json
from .charts import kept_widths
from .content import FORMAT, VERSION
from .markdown import report_markdown
from .page import report_html


def write_report(folder: str | os.PathLike, report: dict[str, Any]) -> None:
    """Writes `report.json`, `report.md`, `report.html` and the heat map of the kept widths, each whole or not at all."""
    folder = Path(folder)
    write_json(folder / REPORT_NAME, report)
    rendered = {
        REPORT_TEXT_NAME: report_markdown(report),
        REPORT_PAGE_NAME: report_html(report),
        CHART_NAME: kept_widths(report),
    }
    for name, text in rendered.items():
        with replace_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def read_report(path: str | os.PathLike) -> dict[str, Any]:
    """Reads `report.json`.

    Raises:
        HeaprError: if it is missing, no report, or of a newer version.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeaprError(f"report={str(path)!r}: cannot be read ({reason_of(error)}); name a report.json") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise HeaprError(f"report={str(path)!r}: is no report of a pruning; name a report.json")
    if report.get("version") != VERSION:
        raise HeaprError(
            f"report={str(path)!r}: has version {report.get('version')!r}, this package reads {VERSION}; update "
            "optimum-heapr"
        )
    return report
