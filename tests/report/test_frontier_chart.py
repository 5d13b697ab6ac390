# Licensed under the Apache License, Version 2.0
"""The chart of a frontier: where its points lie, and what it does not compare."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from optimum_heapr.report.frontier_chart import DECADES, frontier_charts, style


SVG = "{http://www.w3.org/2000/svg}"


def point(ratio, loss, criterion="heapr", measured=None, calibrated=None, num_bytes=True):
    size = round(1e6 * (1 - ratio / 2))
    return {
        "criterion": criterion,
        "layout": "variable",
        "ratio": ratio,
        "parameters": size // 2,
        "num_bytes": size if num_bytes else None,
        "estimated": loss,
        "measured": measured,
        "error": None if measured is None else 0.01,
        "calibrated": calibrated,
    }


def corners(chart):
    """Places of each thick line, from the smallest model."""
    lines = [path for path in ElementTree.fromstring(chart).iter(f"{SVG}path") if path.get("stroke-width") == "2"]
    found = [re.findall(r"[ML]([\d.]+) ([\d.]+)", line.get("d")) for line in lines if "L" in line.get("d")]
    return [[(float(x), float(y)) for x, y in line] for line in found if len(line) > 2]


def test_smaller_is_left_and_worse_is_up():
    """Equal factors of loss are equal heights, and equal bytes equal widths."""
    [chart] = frontier_charts([point(0.2, 0.01), point(0.4, 0.1), point(0.6, 1.0)]).values()
    [[(x0, y0), (x1, y1), (x2, y2)]] = corners(chart)
    assert x0 > x1 > x2 and y0 > y1 > y2
    assert x0 - x1 == pytest.approx(x1 - x2, abs=0.02) and y0 - y1 == pytest.approx(y1 - y2, abs=0.02)


def test_criteria_are_compared_by_what_was_measured_alone():
    estimated = [point(ratio, ratio / 10, criterion) for criterion in ("heapr", "obs") for ratio in (0.2, 0.4, 0.6)]
    charts = frontier_charts(estimated)
    assert list(charts) == ["frontier-heapr", "frontier-obs"]
    assert all(len(corners(chart)) == 1 for chart in charts.values())
    measured = [{**each, "calibrated": 2 * each["estimated"]} for each in estimated]
    charts = frontier_charts(measured)
    assert list(charts) == ["frontier"] and len(corners(charts["frontier"])) == 2
    dashes = [path.get("stroke-dasharray") for path in ElementTree.fromstring(charts["frontier"]).iter(f"{SVG}path")]
    assert "7 3" in dashes, "no line is told from another by its colour alone"


def test_the_chosen_point_is_marked_where_it_was_measured():
    points = [point(0.2, 0.01, calibrated=0.02), point(0.4, 0.1, measured=0.3, calibrated=0.3)]
    points.append(point(0.6, 1.0, measured=2.0, calibrated=2.0))
    chart = frontier_charts(points, points[1])["frontier"]
    assert "chosen: heapr, variable, 40.0% removed, +0.3000" in chart
    [line] = corners(chart)
    cross = next(
        path for path in ElementTree.fromstring(chart).iter(f"{SVG}path") if re.match(r"M[\d. ]+l16 16", path.get("d"))
    )
    x, y = map(float, re.match(r"M([\d.]+) ([\d.]+)l", cross.get("d")).groups())
    assert (x + 8, y + 8) == pytest.approx(line[1], abs=0.02)
    rings = next(path for path in ElementTree.fromstring(chart).iter(f"{SVG}path") if "a4.5" in path.get("d"))
    assert rings.get("d").count("M") == 2


def test_what_cannot_be_drawn_is_left_out():
    [chart] = frontier_charts([point(0.2, 1e-9), point(0.4, 0.1), point(0.6, 1.0, num_bytes=False)]).values()
    assert "parameters" in chart, "bytes are not known of all"
    low, middle, high = (y for _, y in corners(chart)[0])
    assert low - high > 2 * (middle - high) > 0 and (low - high) < (DECADES + 1) * (middle - high)
    assert "no plan raises the loss" in frontier_charts([point(0.2, 0.0)])["frontier-heapr"]


def test_no_two_of_sixteen_lines_look_the_same():
    styles = [style(index) for index in range(16)]
    assert len(set(styles)) == 16
    assert all(len({styles[index][part] for index in range(4)}) == 4 for part in (0, 1)), (
        "colour and dash both tell few"
    )
    numbers = [
        {**point(ratio, ratio, calibrated=ratio), "num_experts": n} for n in (None, 8) for ratio in (0.2, 0.4, 0.6)
    ]
    [chart] = frontier_charts(numbers).values()
    assert "heapr, variable, 8 experts" in chart and len(corners(chart)) == 2
