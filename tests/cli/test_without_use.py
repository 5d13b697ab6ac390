# Licensed under the Apache License, Version 2.0
"""Flags that change nothing beside the others are named, in the terms of the command line, and what was asked for is done."""

import pytest

from optimum_heapr import PruningPlan
from optimum_heapr.utils.logging import say_once


@pytest.fixture
def said(run, heapr_log):
    """Runs a command that succeeds, and gives what it says has no use."""
    say_once.cache_clear()

    def said(*command) -> list[str]:
        result = run(*command)
        assert result.status == 0, result.error
        return [line for record in heapr_log.records if "has no use" in (line := record.getMessage())]

    return said


def test_of_apply_text_and_statistics_where_the_plan_takes_none(said, inputs, tmp_path):
    """The text that was calibrated on stays that of the model."""
    given = ["-s", inputs.statistics, "--dataset", "other.jsonl", "--num-samples", 9, "--seq-length", 16]
    found = said("apply", "-m", inputs.model, "-p", inputs.plan, "-o", tmp_path / "out", *given)
    assert found == [
        "--dataset other.jsonl: has no use, as the plan does not compensate over blocks",
        "--seq-length 16: has no use, as the plan does not compensate over blocks",
        f"--statistics {inputs.statistics}: has no use, as the plan does not compensate within experts",
    ]
    assert PruningPlan.load(tmp_path / "out").config == PruningPlan.load(inputs.pruned).config


def test_of_evaluate_what_belongs_to_other_measurements(said, inputs):
    given = ["--split", "train", "--limit", 3, "--new-tokens", 5, "--batch-size", 2]
    found = said("evaluate", "-m", inputs.model, "--dataset", inputs.text, "--seq-length", 24, *given)
    assert found == [
        "--limit 3: has no use without --tasks",
        "--new-tokens 5: has no use without --speed",
        "--batch-size 2: has no use without --tasks or --speed",
    ]


@pytest.mark.parametrize(("memory", "is_used"), [("plain", False), ("streaming", True), ("offload", False)])
def test_memory_for_activations_where_layers_are_not_gone_through(memory, is_used, said, inputs, tmp_path):
    given = [*inputs.calibration, "--memory", memory, "--activation-memory", "8MB"]
    found = said("calibrate", "-m", inputs.model, "-o", tmp_path / "out", *given)
    assert found == ([] if is_used else [f"--activation-memory 8MB: has no use with --memory {memory}"])


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        ([], ["--reduction total: has no use with --criterion magnitude"]),
        (["random", "magnitude"], ["--reduction total: has no use with --criterion random and --criterion magnitude"]),
        (["random", "fisher"], []),
    ],
)
def test_of_frontier_what_no_criterion_takes(criteria, expected, said, inputs):
    given = ["--criterion", "magnitude", "--reduction", "total", *(["--criteria", *criteria] if criteria else [])]
    assert said("frontier", "-s", inputs.statistics, "--ratios", "0.25", *given) == expected
