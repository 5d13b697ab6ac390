# Licensed under the Apache License, Version 2.0
"""`calibrate --statistics gram` or `--criterion obs --no-grams`, `plan`, `apply --statistics` and `prune` with compensation, through the command line."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file

from optimum_heapr import AtomicStatistics, PruningPlan
from optimum_heapr.cli import HeaprCommand
from tests.helpers import plain_qwen3_moe


def run(*arguments) -> None:
    parser = argparse.ArgumentParser("optimum-cli")
    HeaprCommand(parser.add_subparsers())
    args = parser.parse_args(["heapr", *map(str, arguments)])
    args.func(args).run()


@pytest.fixture
def inputs(tmp_path):
    """A tiny model and rows of token ids."""
    plain_qwen3_moe().save_pretrained(tmp_path / "model")
    rows = torch.randint(0, 40, (8, 24), generator=torch.Generator().manual_seed(1)).tolist()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return tmp_path


def test_steps_and_the_whole_give_the_same_model(inputs, capsys):
    data = ("--dataset", inputs / "rows.jsonl", "--num-samples", 8, "--batch-size", 4)
    plan = ("--ratio", 0.5, "--criterion", "obs", "--compensate")
    statistics = ("--statistics", inputs / "statistics.safetensors")
    run("calibrate", "-m", inputs / "model", "-o", statistics[1], "--statistics", "gram", *data)
    run("plan", *statistics, "-o", inputs / "plan.safetensors", *plan)
    steps = ("-m", inputs / "model", "-p", inputs / "plan.safetensors", "-o", inputs / "steps")
    capsys.readouterr()
    run("apply", *steps, *statistics)
    assert "compensation: mean relative squared error of" in capsys.readouterr().out
    run("prune", "-m", inputs / "model", "-o", inputs / "whole", *plan, *data)
    one, other = (load_file(inputs / name / "model.safetensors") for name in ("steps", "whole"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight)
    assert PruningPlan.load(inputs / "whole").compensation


@pytest.mark.parametrize(("in_memory", "steps_of_training"), [(True, 0), (False, 0), (False, 3)])
def test_over_blocks_the_text_is_named_again(inputs, capsys, heapr_log, in_memory, steps_of_training):
    data = ("--dataset", inputs / "rows.jsonl", "--num-samples", 8, "--batch-size", 4)
    plan = ("--ratio", 0.5, "--compensate", "--compensation-scope", "block")
    plan += ("--reconstruction-steps", steps_of_training)
    run("prune", "-m", inputs / "model", "-o", inputs / "whole", *plan, *data)
    printed = capsys.readouterr().out
    assert "mean relative squared error of the routed outputs of 2 layers" in printed
    assert ("of the outputs of 2 layers on held-out tokens" in printed) == (steps_of_training > 0)
    run("plan", "--statistics", inputs / "whole", "-o", inputs / "plan.safetensors", *plan)
    steps = ["apply", "-m", inputs / "model", "-p", inputs / "plan.safetensors", "-o", inputs / "steps"]
    steps += ["--in-memory"] * in_memory
    with pytest.raises(SystemExit):
        run(*steps)
    assert "--dataset: the plan compensates over blocks, which takes text, and names none" in capsys.readouterr().err
    assert not (inputs / "steps").exists()
    run(*steps, *data)
    assert "compensated on other text" not in heapr_log.text
    assert (inputs / "steps" / "model.safetensors").read_bytes() == (
        inputs / "whole" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(SystemExit):
        run(*steps, "--overwrite", "--num-samples", 0)
    assert "--num-samples 0: must be at least 1" in capsys.readouterr().err
    run(*steps, "--overwrite", *data, "--num-samples", 4)
    assert "compensated on other text than it was measured on" in heapr_log.text


def test_what_is_missing_is_said(inputs, capsys):
    data = ("--dataset", inputs / "rows.jsonl", "--num-samples", 8)
    run("calibrate", "-m", inputs / "model", "-o", inputs / "vectors.safetensors", *data)
    refused = [
        (
            ("plan", "-s", inputs / "vectors.safetensors", "--compensate", "--dry-run"),
            "hold no matrices to compensate with",
        ),
        (("plan", "-s", inputs / "vectors.safetensors", "--criterion", "obs", "--dry-run"), "--statistics gram"),
        (
            ("apply", "-m", inputs / "model", "-p", inputs / "plan.safetensors", "-o", inputs / "out"),
            "--compensate and --statistics",
        ),
    ]
    plan = ("--compensate", "-o", inputs / "plan.safetensors")
    assert "--compensate within experts not: calibrate with --criterion obs" in capsys.readouterr().out
    run("calibrate", "-m", inputs / "model", "-o", inputs / "matrices.safetensors", "--statistics", "gram", *data)
    assert "serves every ratio, criterion and layout, and --compensate;" in capsys.readouterr().out
    run("plan", "-s", inputs / "matrices.safetensors", *plan)
    for arguments, message in refused:
        with pytest.raises(SystemExit) as status:
            run(*arguments)
        assert status.value.code == 2
        assert message in capsys.readouterr().err
    assert not (inputs / "out").exists()


def test_removal_curves_serve_every_ratio(inputs, capsys):
    data = ("--dataset", inputs / "rows.jsonl", "--num-samples", 8, "--batch-size", 4)
    run("calibrate", "-m", inputs / "model", "-o", inputs / "gram.safetensors", "--statistics", "gram", *data)
    run(
        "calibrate",
        "-m",
        inputs / "model",
        "-o",
        inputs / "obs.safetensors",
        "--criterion",
        "obs",
        "--no-grams",
        *data,
    )
    run("prune", "-m", inputs / "model", "-o", inputs / "pruned", "--criterion", "obs", *data)
    blocks = AtomicStatistics.load(inputs / "obs.safetensors").blocks
    assert all(block.has_curves and not block.has_grams for block in blocks.values())
    assert not any(block.has_curves for block in AtomicStatistics.load(inputs / "gram.safetensors").blocks.values())
    for ratio in (0.2, 0.6):
        plans = []
        for name in ("gram.safetensors", "obs.safetensors", "pruned/heapr/statistics.safetensors"):
            out = inputs / f"{ratio}-{len(plans)}.safetensors"
            run("plan", "-s", inputs / name, "-o", out, "--criterion", "obs", "--ratio", ratio)
            plans.append(PruningPlan.load(out))
        for plan in plans[1:]:
            for path, experts in plans[0].kept.items():
                assert all(map(torch.equal, plan.kept[path], experts))
    with pytest.raises(SystemExit):
        run("calibrate", "-m", inputs / "model", "-o", inputs / "other.safetensors", "--no-grams", *data)
    assert "--no-grams: with --criterion heapr" in capsys.readouterr().err
