# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr frontier`."""

import json
import shlex

import pytest

from optimum_heapr import HeaprError, PruningPlan
from optimum_heapr.cli.frontier import ratios_of


def test_ratios():
    assert ratios_of("0.1:0.9:0.2") == [0.1, 0.3, 0.5, 0.7, 0.9] and ratios_of("0.25,0.5") == [0.25, 0.5]
    for text in ("0.1:0.9", "a,b", "0.1:0.9:0", "0.5,1.5", "0.9:0.1:0.1", "0.1:0.9:nan", "0.1:0.9:0.00001", ""):
        with pytest.raises(HeaprError, match="ratios="):
            ratios_of(text)


def test_frontier(inputs, run):
    result = run("frontier", "-s", inputs.statistics, "--ratios", "0.2,0.5", "--criteria", "heapr", "magnitude")
    assert result.status == 0, result.error
    rows = [line.split() for line in result.output.splitlines()]
    assert [row[0] for row in rows[2:6]] == ["heapr", "heapr", "magnitude", "magnitude"]
    assert "compare ratios, not criteria" in result.output


def test_numbers_of_experts(inputs, run):
    flags = ["--ratios", "0.5", "--layouts", "variable", "uniform", "--experts", "all", 4, "--width-multiple", 2]
    result = run("frontier", "-s", inputs.statistics, *flags)
    assert result.status == 0, result.error
    rows = [line.split()[:3] for line in result.output.splitlines()]
    assert rows[0] == ["criterion", "layout", "experts"]
    assert rows[2:5] == [["heapr", "variable", "all"], ["heapr", "uniform", "all"], ["heapr", "uniform", "4"]]


def test_measured(inputs, run):
    text = inputs.calibration[inputs.calibration.index("--dataset") + 1]
    flags = ["-m", inputs.model, "--measure", text, "--windows", 2, "--window-length", 16, "--points", 2]
    result = run("frontier", "-s", inputs.statistics, "--ratios", "0.2,0.4,0.6", *flags, "--json")
    assert result.status == 0, result.error
    points = json.loads(result.output)["points"]
    assert [point["measured"] is None for point in points] == [False, True, False]
    assert all(point["calibrated"] is not None for point in points)


def test_a_chart_and_the_chosen_point(inputs, run, tmp_path, monkeypatch):
    text = inputs.calibration[inputs.calibration.index("--dataset") + 1]
    flags = ["-m", inputs.model, "--measure", text, "--windows", 2, "--window-length", 16, "--points", 2]
    output = tmp_path / "frontier"
    asked = ["frontier", "-s", inputs.statistics, "--ratios", "0.2,0.4,0.6", *flags, "-o", output]
    result = run(*asked, "--max-loss-increase", 50)
    assert result.status == 0, result.error
    assert "chosen for a loss increase of at most 50: heapr, variable, 59.7% removed" in result.output
    written = json.loads((output / "frontier.json").read_text())
    assert len(written["points"]) == 3 and written["chosen"] == written["points"][-1]
    assert written["command"] in result.output
    assert "chosen: heapr" in (output / "frontier.svg").read_text()
    assert run(*asked).status == 2, "what is there is not replaced unasked"
    monkeypatch.setattr(
        "optimum_heapr.frontier.smallest_within", lambda *_: None
    )  # a random model may well lose nothing
    result = run(*asked, "--max-loss-increase", 50, "--overwrite")
    assert result.status == 0 and "at most 50: none" in result.output, "what was measured is not lost"
    assert "chosen" not in (output / "frontier.svg").read_text()


def test_the_command_that_is_printed_makes_what_was_chosen(inputs, run, tmp_path):
    text = inputs.calibration[inputs.calibration.index("--dataset") + 1]
    flags = ["-m", inputs.model, "--measure", text, "--windows", 2, "--window-length", 16, "--dtype", "float32"]
    flags += [
        "--criterion",
        "fisher",
        "--layout",
        "padded",
        "--protect",
        "model.layers.0.*:1,2",
        "--protect-unreached",
    ]
    found = run("frontier", "-s", inputs.statistics, "--ratios", "0.2:0.6:0.1", *flags, "--max-loss-increase", 50)
    chosen = next(line for line in found.output.splitlines() if "optimum-cli heapr prune" in line)
    words = shlex.split(chosen)[2:-1]
    assert words[words.index("--dtype") + 1] == "float32"
    result = run(*words, tmp_path / "pruned", "--eval-samples", 1, "--seq-length", 16)
    assert result.status == 0 and "measured loss" in result.output, result.error
    plan = PruningPlan.load(tmp_path / "pruned")
    config = plan.config
    assert (config.criterion, config.layout, config.ratio, config.protect_unreached) == ("fisher", "padded", 0.6, True)
    assert config.protect == "model.layers.0.*:1,2" and f"{plan.ratio:.1%} removed" in found.output


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--ratios", "half"], "--ratios half: must be FIRST:LAST:STEP"),
        (["--measure", "demo"], "--measure and --model go together"),
        (["--measure", "demo", "-m", "demo", "--max-loss-increase", 0], "--max-loss-increase 0: must be above 0"),
        (["--measure", "demo", "-m", "demo", "--windows", 1], "--windows 1: must be at least 2"),
        (["--max-loss-increase", 0.1], "--max-loss-increase 0.1: is about measuring; add --measure and --model"),
        (["--windows", 4], "--windows 4: is about measuring"),
        (["--points", 4], "--points 4: is about measuring"),
        (["--dtype", "float32"], "--dtype float32: is about measuring"),
        (["--criteria", "heap"], "must be one of"),
        (["--experts", "4"], "needs the layout uniform, not variable; add it to the layouts"),
        (
            ["--experts", "auto"],
            "--experts auto: must be numbers such as 32 24 16, or all; --num-experts auto of 'prune'",
        ),
        (["--measure", "demo", "-m", "demo", "--dtype", "int4"], "--dtype int4: must be one of"),
    ],
)
def test_refusals(flags, expected, inputs, run):
    result = run("frontier", "-s", inputs.statistics, *flags)
    assert result.status == 2 and expected in result.error and result.error.count("\n") == 1
