# Licensed under the Apache License, Version 2.0
"""The report on disk: one source, three renderings; the page stands alone, is small, and runs nothing that it shows."""

import copy
import html.parser
import json
import re
import shutil
import subprocess
import time
from importlib.resources import files

import pytest

from optimum_heapr import HeaprError
from optimum_heapr.report.files import read_report, write_report
from optimum_heapr.report.markdown import report_markdown
from optimum_heapr.report.page import report_html
from optimum_heapr.report.search_chart import search_chart
from optimum_heapr.report.svg import DARK, FAINT, GRID, INK
from tests.report.reports import large_report, measured_pruner


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = "</script><script>document.title='run'</script><img src=http://127.0.0.1:9/x onerror=alert(1)>`|\n```\n&amp;"


class Elements(html.parser.HTMLParser):
    """All tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open[-1:]):
            self.text.append(data)


def hostile_report() -> dict:
    report = copy.deepcopy(measured_pruner().report)
    report["model"] = HOSTILE
    report["calibration"]["source"] = report["loss"]["measured"]["source"] = report["config"]["dataset"] = HOSTILE
    report["problems"] = [HOSTILE]
    report["samples"] = [{"prompt": HOSTILE, "before": HOSTILE + "a", "after": HOSTILE + "b"}]
    for block in report["blocks"]:
        block["path"] = f"model.layers.{HOSTILE}"
    return report


def test_everything_is_rendered_from_the_json(tmp_path):
    write_report(tmp_path, measured_pruner().report)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "kept_widths.svg",
        "report.html",
        "report.json",
        "report.md",
    ]
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_report(tmp_path, read_report(tmp_path / "report.json"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_the_page_and_the_markdown_show_the_figures():
    report = measured_pruner().report
    measured = report["loss"]["measured"]
    text = " ".join(Elements(report_html(report)).text)
    for shown in (text, report_markdown(report)):
        assert f"{measured['before']['loss']:.4f}" in shown and f"{measured['after']['perplexity']:.3f}" in shown
        assert f"± {measured['increase_standard_error']:.4f}" in shown
        assert "that calibration did not see" in shown
        for heading in ("Before and after", "What was removed where", "Importance", "Expert coverage", "Compensation"):
            assert heading in shown
        for block in report["blocks"]:
            assert f"{block['compensation']['after']:.4f}" in shown


def test_the_page_and_the_markdown_show_what_training_did():
    report = copy.deepcopy(measured_pruner().report)
    assert "Reconstruction" not in report_markdown(report)
    for block in report["blocks"]:
        block["reconstruction"] = {"removed": 0.31, "fitted": 0.2, "trained": 0.15, "kept": "trained"}
    report["blocks"][1]["reconstruction"] |= {"trained": None, "kept": "fitted"}
    text = " ".join(Elements(report_html(report)).text)
    for shown in (text, report_markdown(report)):
        assert "Reconstruction" in shown and "-25" in shown.replace("\N{MINUS SIGN}", "-") and "not finite" in shown
    assert "| 0.3100 | 0.2000 | 0.1500 | trained |" in report_markdown(report)


def test_the_page_needs_nothing_beside_it():
    page = report_html(measured_pruner().report)
    addresses = re.findall(r"(?:src|href|url|action)\s*[=(]\s*['\"]?([^'\")\s>]+)", page)
    assert {address for address in addresses if not address.startswith(("data:", "#"))} == set()
    assert not re.search(r"@import|fetch\(|XMLHttpRequest|<link rel='stylesheet'", page)
    assert set(re.findall(r"https?://[^'\"\s<]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_charts_turn_dark_with_the_page():
    """What lies on the paper has a rule of its own for it: it is drawn in colours, which do not know of the page."""
    style = files("optimum_heapr.report").joinpath("page.css").read_text(encoding="utf-8")
    dark = style.partition("prefers-color-scheme: dark")[2].partition("@media print")[0]
    for colour in (FAINT, GRID, INK, DARK):
        assert f'"{colour}"' in dark, colour


def test_each_chart_is_drawn_for_a_phone_as_well():
    """At most as wide as what a screen of 390 px leaves, so that letters keep their size and nothing is cut off at the edge."""
    page = report_html(measured_pruner().report)
    widths = re.findall(r"<div class='(roomy|narrow)'><svg [^>]*viewBox='0 0 (\d+) ", page)
    assert len(widths) == page.count("<svg") and set(widths) == {("roomy", "920"), ("narrow", "340")}
    for right in re.findall(r"<text x='([\d.]+)'", "".join(re.findall(r"<div class='narrow'>.*?</svg>", page))):
        assert float(right) <= 340
    names = re.findall(r" id='([^']+)'", page)
    assert len(set(names)) == len(names)


def test_the_page_and_the_markdown_show_what_was_searched():
    report = copy.deepcopy(measured_pruner().report)
    assert "How much to cut" not in report_html(report)
    report["config"] = {**report["config"], "max_loss_increase": 0.1}
    report["search"] = [
        {"ratio": 0.6, "increase": 0.3, "error": 0.02},
        {"ratio": report["removed"]["ratio"], "increase": 0.08, "error": 0.01},
        {"ratio": 0.2, "increase": -0.001, "error": 0.01},
    ]
    page = report_html(report)
    for shown in (" ".join(Elements(page).text), report_markdown(report)):
        assert "How much to cut" in shown and "Allowed are 0.1 nats" in shown and "+0.3000" in shown
    chart = search_chart(report)
    assert chart in page and "allowed: 0.1" in chart and chart.count("taken: ") == 1
    rings = next(part for part in re.findall(r"<path d='([^']+)'", chart) if "a4.5" in part)
    heights = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)a4.5", rings)]
    assert heights[0] < heights[1] < heights[2], "a greater loss is further up"


def test_nothing_that_is_shown_is_run():
    plain, hostile = Elements(report_html(measured_pruner().report)), Elements(report_html(hostile_report()))
    names = {tag for tag, _ in hostile.tags}
    assert names <= {tag for tag, _ in plain.tags}  # no element of theirs
    assert sum(tag == "script" for tag, _ in hostile.tags) == 2
    assert not any(name.startswith("on") for _, attributes in hostile.tags for name in attributes)
    assert HOSTILE.splitlines()[0].split("`")[0] in "".join(hostile.text)  # shown as it stands


def test_markdown_keeps_to_its_blocks():
    lines = report_markdown(hostile_report()).splitlines()
    fences = [line for line in lines if line.startswith("````")]
    assert len(fences) == 6 and len({len(line.rstrip("text")) for line in fences}) == 1
    tables = [line for line in lines if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in tables if "script" in line} <= {11, 7}


def test_a_large_plan_stays_small(tmp_path):
    began = time.process_time()
    write_report(tmp_path, large_report())
    assert (tmp_path / "report.html").stat().st_size < 1_000_000  # 3 MB were allowed
    assert (tmp_path / "kept_widths.svg").stat().st_size < 400_000
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    "content, problem",
    [
        ("", "cannot be read"),
        ("[]", "is no report"),
        ('{"format": "heapr_plan"}', "is no report"),
        ('{"format": "heapr_report", "version": 9}', "has version 9"),
    ],
)
def test_other_files_are_refused(content, problem, tmp_path):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(HeaprError, match=problem):
        read_report(tmp_path / "report.json")
    with pytest.raises(HeaprError, match="cannot be read"):
        read_report(tmp_path / "missing.json")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: this test renders the page in it")
@pytest.mark.parametrize("kind", ["large", "hostile"])
def test_a_browser_opens_it(kind, tmp_path):
    """No error on the console, no request to anywhere, the script has run, and it takes no two seconds over an empty page."""
    report = large_report() if kind == "large" else hostile_report()
    # What the page itself can see of it, put where it can be read from outside.
    probe = (
        "<script>window.problems = [];"
        "addEventListener('error', (event) => problems.push(String(event.message)), true);"
        "addEventListener('load', () => setTimeout(() => {"
        "  const map = document.querySelector('figure.heat svg'), box = map.getBoundingClientRect();"
        "  map.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width * 0.08, clientY: box.top + 12}));"
        "  document.body.dataset.probe = JSON.stringify({problems,"
        "    requests: performance.getEntriesByType('resource').map((entry) => entry.name).filter((name) => !name.startsWith('data:')),"
        "    title: document.title,"
        "    readout: document.querySelector('figure.heat output').textContent}); }, 100));</script>"
    )
    page = tmp_path / "report.html"
    page.write_text(report_html(report).replace("<head>", "<head>" + probe, 1))
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        "--enable-logging=stderr",
        "--v=0",
    ]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    empty = tmp_path / "empty.html"
    empty.write_text("<!doctype html><title>empty</title>")
    took = []
    for file in (empty, page):
        began = time.perf_counter()
        done = subprocess.run(
            [CHROMIUM, *flags, profile, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120
        )
        took.append(time.perf_counter() - began)
    body = next(attributes for tag, attributes in Elements(done.stdout).tags if tag == "body")
    seen = json.loads(body["data-probe"])
    assert seen["problems"] == [] and seen["requests"] == [] and "CONSOLE" not in done.stderr
    assert took[1] - took[0] < 2
    assert "calibration tokens" in seen["readout"] and "expert" in seen["readout"]
    assert seen["title"] != "run"
