# Licensed under the Apache License, Version 2.0
"""`--max-loss-increase`."""

import pytest

from optimum_heapr.planning.plan import PruningPlan


FLAGS = ("--max-loss-increase", 0.5, "--eval-samples", 4)


def test_prune_searches_and_says_what_it_measured(inputs, run, tmp_path):
    result = run("prune", "-m", inputs.model, *inputs.calibration, *FLAGS, "-o", tmp_path / "pruned")
    assert result.status == 0, result.error
    plan = PruningPlan.load(tmp_path / "pruned")
    assert plan.search and plan.config.goal == ("max_loss_increase", 0.5)
    lines = result.output.splitlines()
    for point in plan.search:
        line = f"  removed {point['ratio']:.2%}: loss {point['increase']:+.5f} ± {point['error']:.5f}"
        assert line + (", taken" if point["ratio"] == plan.ratio else "") in lines
    assert result.output.count(", taken") == 1 and "to stay within 0.5 nats a token" in result.output
    assert "asked --max-loss-increase 0.5" in result.output
    shown = run("inspect", tmp_path / "pruned" / "heapr" / "plan.safetensors")
    assert shown.status == 0 and f"removed {plan.search[0]['ratio']:.2%}: loss" in shown.output


def test_a_dry_run_with_statistics_searches_too(inputs, run):
    result = run("prune", "-m", inputs.model, "-s", inputs.statistics, *inputs.calibration, *FLAGS, "--dry-run")
    assert result.status == 0, result.error
    assert "asked --max-loss-increase 0.5" in result.output


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--ratio", 0.3], "--max-loss-increase 0.5: --ratio 0.3 is given as well"),
        (["--memory", "streaming"], "--max-loss-increase 0.5: plans are measured with the model in memory"),
        (["--eval-samples", 0], "--eval-samples 0: must be at least 2"),
    ],
)
def test_refusals(flags, expected, inputs, run, tmp_path):
    output = tmp_path / "pruned"
    result = run("prune", "-m", inputs.model, *inputs.calibration, *FLAGS, *flags, "-o", output)
    assert result.status == 2 and expected in result.error and not output.exists()


def test_planning_from_statistics_alone_has_no_such_flag(inputs, run, tmp_path):
    assert run("plan", "-s", inputs.statistics, *FLAGS[:2]).status == 2
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_loss_increase: 0.5\n")
    result = run("plan", "-s", inputs.statistics, "-c", recipe, "-o", tmp_path / "plan.safetensors")
    assert result.status == 2 and "--max-loss-increase 0.5: is measured with the model" in result.error
