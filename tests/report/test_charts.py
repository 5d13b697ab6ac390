# Licensed under the Apache License, Version 2.0
"""Charts show every number there is, and say nothing by colour alone."""

import colorsys
import copy
import re
import xml.etree.ElementTree as ElementTree

from optimum_heapr.report import charts
from optimum_heapr.report.search_chart import TOP, search_chart
from optimum_heapr.report.svg import cividis
from tests.report.reports import large_report, measured_pruner


SVG = "{http://www.w3.org/2000/svg}"
CHARTS = (
    "kept_widths",
    "tokens_per_expert",
    "kept_by_layer",
    "loss_by_layer",
    "compensated_errors",
    "importance_histogram",
)


def cells(chart: str) -> dict[tuple[float, float], str]:
    """Colour of each cell of a heat map by its corner."""
    paths = [path for group in ElementTree.fromstring(chart).iter(f"{SVG}g") for path in group]
    found = [(place, path.get("fill")) for path in paths for place in re.findall(r"M([\d.]+) ([\d.]+)", path.get("d"))]
    return {(float(x), float(y)): colour for (x, y), colour in found}


def luminance(colour: str) -> float:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_charts_are_pictures_with_a_title():
    for name in CHARTS:
        root = ElementTree.fromstring(getattr(charts, name)(measured_pruner().report))
        assert root.tag == f"{SVG}svg" and root.find(f"{SVG}title").text and root.get("role") == "img"


def test_names_inside_the_pictures_of_a_page_differ():
    names = re.findall(r" id='([^']+)'", "".join(getattr(charts, name)(measured_pruner().report) for name in CHARTS))
    assert len(names) == len(set(names)) > 2


def test_each_expert_has_a_cell_and_more_is_lighter():
    report = measured_pruner().report
    found = cells(charts.kept_widths(report))
    assert len(found) == sum(len(block["widths"]) for block in report["blocks"])
    for block, y in zip(report["blocks"], sorted({y for _, y in found})):
        row = [luminance(found[place]) for place in sorted(found) if place[1] == y]
        by_width = sorted(zip(block["widths"], row))
        assert [light for _, light in by_width] == sorted(row)


def test_colours_are_ordered_in_grey_and_keep_clear_of_red_and_green():
    colours = [cividis(i / 100) for i in range(101)]
    lights = [luminance(colour) for colour in colours]
    assert lights == sorted(lights) and lights[-1] - lights[0] > 0.6
    for colour in colours:
        hue, saturation, _ = colorsys.rgb_to_hsv(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))
        assert saturation < 0.2 or 0.11 < hue < 0.16 or 0.57 < hue < 0.65  # yellow or blue


def test_empty_and_unreached_experts_are_marked():
    report = copy.deepcopy(large_report(3, 8, 16))
    report["blocks"][0]["widths"][2], report["blocks"][1]["unreached"] = 0, [4]
    for block in (report["blocks"][0], report["blocks"][2]):
        block["unreached"] = []
    report["blocks"][1]["widths"] = [1] * 8
    report["blocks"][2]["widths"] = [16] * 8
    report["blocks"][0]["widths"] = [16, 16, 0, *[16] * 5]
    marks = list(ElementTree.fromstring(charts.kept_widths(report)).findall(f"{SVG}path"))
    crosses = [path for path in marks if "m0 -" in path.get("d")]
    rings = [path for path in marks if "a" in path.get("d")]
    assert len(crosses) == len(rings) == 2  # in the picture, and in the legend
    legend = charts.kept_widths(report)
    assert "nothing kept" in legend and "no calibration token" in legend
    for block in report["blocks"]:
        block["widths"], block["unreached"] = [8] * 8, []
    plain = charts.kept_widths(report)
    assert "nothing kept" not in plain and "no calibration token" not in plain


def test_the_histogram_holds_every_atomic_expert():
    importance = measured_pruner().report["importance"]
    assert sum(importance["kept"]) + importance["below"][0] == measured_pruner().report["removed"]["after"]
    assert sum(importance["removed"]) + sum(importance["kept"]) + sum(importance["below"]) == 144
    assert "cut at" in charts.importance_histogram(measured_pruner().report)


def test_what_is_not_known_is_not_drawn():
    report = {**measured_pruner().report, "importance": {}}
    report["blocks"] = [{**block, "tokens": None} for block in report["blocks"]]
    for block in report["blocks"]:
        block.pop("compensation")
    assert (
        charts.importance_histogram(report)
        == charts.tokens_per_expert(report)
        == charts.compensated_errors(report)
        == ""
    )


def test_what_was_taken_is_said_where_no_mark_is():
    """Above the highest line of the axis, on the side of its mark that has room, in both widths."""
    found = [(0.5, 0.0178), (0.25, 0.0022), (0.475, 0.0147), (0.9, 0.019)]
    points = [{"ratio": ratio, "increase": increase, "error": 0.003} for ratio, increase in found]
    for taken in (0.25, 0.475, 0.9):
        report = {"search": points, "config": {"max_loss_increase": 0.02}, "removed": {"ratio": taken}}
        for room in (charts.WIDTH, charts.NARROW):
            drawn = ElementTree.fromstring(search_chart(report, room))
            [label] = [text for text in drawn.iter(f"{SVG}text") if text.text.startswith("taken")]
            assert float(label.get("y")) < TOP < 40
            x, long = float(label.get("x")), 6.5 * len(label.text)
            left, right = (x - long, x) if label.get("text-anchor") == "end" else (x, x + long)
            assert 0 < left and right < room
