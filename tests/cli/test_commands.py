# Licensed under the Apache License, Version 2.0
"""Each command does what its name says, alone and one after another."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_heapr import AtomicStatistics, HeaprConfig, PruningPlan
from optimum_heapr.cli import HeaprCommand
from optimum_heapr.cli.tables import speed_table
from optimum_heapr.utils.files import replace_folder
from tests.cli.conftest import listing, weights_and_settings


def test_calibrate_writes_statistics(run, inputs, tmp_path):
    output = tmp_path / "new" / "statistics.safetensors"
    result = run("calibrate", "-m", inputs.model, "-o", output, *inputs.calibration)
    assert result.status == 0 and result.error == ""
    assert "model.layers.1.mlp.experts" in result.output and str(output) in result.output
    measured, expected = AtomicStatistics.load(output), AtomicStatistics.load(inputs.statistics)
    assert measured.fingerprint == expected.fingerprint
    for path, block in expected.blocks.items():
        assert torch.equal(measured.blocks[path].gradient_sq_sum, block.gradient_sq_sum)
    assert listing(tmp_path).keys() == {"new", "new/statistics.safetensors"}


def test_calibrate_takes_token_ids(run, inputs, tmp_path):
    output = tmp_path / "s.safetensors"
    flags = ["--dataset", inputs.tokens, "--num-samples", 6, "--batch-size", 3]
    assert run("calibrate", "-m", inputs.model, "-o", output, *flags).status == 0
    assert AtomicStatistics.load(output).num_tokens == 6 * 24


def test_calibrate_overwrites_only_when_told(run, inputs, tmp_path):
    output = tmp_path / "s.safetensors"
    shutil.copy(inputs.plan, output)
    refused = run("calibrate", "-m", inputs.model, "-o", output, *inputs.calibration)
    assert refused.status == 2 and "--overwrite" in refused.error and output.read_bytes() == inputs.plan.read_bytes()
    assert run("calibrate", "-m", inputs.model, "-o", output, "--overwrite", *inputs.calibration).status == 0
    assert AtomicStatistics.load(output).num_tokens > 0


@pytest.mark.parametrize("flags", [["-s"], ["--memory", "streaming"]])
def test_prune_says_where_nothing_was_measured(flags, run, inputs, tmp_path):
    flags = [*flags, inputs.statistics] if flags == ["-s"] else [*flags, *inputs.calibration]
    asked = ["prune", "-m", inputs.model, "--ratio", 0.3, *flags]
    result = run(*asked, "-o", tmp_path / "one")
    assert result.status == 0 and result.output.count("not measured: ") == 1 and "'evaluate'" in result.output
    assert "not measured" not in run(*asked, "-o", tmp_path / "other", "--eval-samples", 0).output, "nobody asked"


def test_less_than_asked_is_said(run, inputs):
    flags = ["--layout", "uniform", "--ratio", 0.4, "--dry-run"]
    result = run("plan", "-s", inputs.statistics, *flags, "--width-multiple", 5)
    assert "less than asked, as one width for all is rounded up to a multiple of 5" in result.output, result
    assert "less than asked" not in run("plan", "-s", inputs.statistics, "--ratio", 0.4, "--dry-run").output


def test_plan_needs_statistics_alone(run, inputs, tmp_path):
    output = tmp_path / "plan.safetensors"
    result = run("plan", "-s", inputs.statistics, "-o", output, "--ratio", "0.4", "--min-width", "2")
    assert result.status == 0 and result.error == ""
    plan = PruningPlan.load(output)
    assert plan.config.ratio == 0.4 and plan.config.min_width == 2
    assert plan.ratio == pytest.approx(0.4, abs=0.01)
    assert min(min(widths) for widths in plan.widths.values()) >= 2
    assert f"removed {plan.ratio:.2%}" in result.output and f"{plan.parameter_ratio:.2%} of all" in result.output


def test_plan_dry_run_writes_nothing(run, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the default output would go
    result = run("plan", "-s", inputs.statistics, "--dry-run")
    assert result.status == 0 and "est. loss" in result.output and "written" not in result.output
    assert listing(tmp_path) == {}


def test_two_ratios_from_one_calibration(run, inputs, tmp_path):
    for ratio in ("0.2", "0.5"):
        assert run("plan", "-s", inputs.statistics, "-o", tmp_path / ratio, "--ratio", ratio).status == 0
    few, many = PruningPlan.load(tmp_path / "0.2"), PruningPlan.load(tmp_path / "0.5")
    assert few.removed < many.removed
    for path, experts in many.kept.items():
        for small, large in zip(experts, few.kept[path]):
            assert set(small.tolist()) <= set(large.tolist())


def test_apply_makes_the_model_of_prune(run, inputs, tmp_path):
    output = tmp_path / "out"
    result = run("apply", "-m", inputs.model, "-p", inputs.plan, "-o", output)
    assert result.status == 0 and result.error == ""
    assert weights_and_settings(output) == weights_and_settings(inputs.pruned)
    assert PruningPlan.load(output).widths == PruningPlan.load(inputs.plan).widths
    assert not (output / "heapr" / "statistics.safetensors").exists()  # apply never saw them


def test_prune_writes_a_model_that_loads(run, inputs, tmp_path):
    output = tmp_path / "out"
    result = run("prune", "-m", inputs.model, "-o", output, "--ratio", "0.25", *inputs.calibration)
    assert result.status == 0 and result.error == ""
    assert weights_and_settings(output) == weights_and_settings(inputs.pruned)  # to the byte: deterministic
    assert listing(tmp_path).keys() == {"out", *(f"out/{name}" for name in listing(output))}
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.model_type == "heapr_qwen3_moe" and model.generation_config.temperature == 0.5
    assert AutoTokenizer.from_pretrained(output)("a dog")["input_ids"]


def test_prune_from_statistics_reads_no_text(run, inputs, tmp_path):
    output = tmp_path / "out"
    result = run("prune", "-m", inputs.model, "-o", output, "-s", inputs.statistics, "--ratio", "0.5")
    assert result.status == 0
    assert PruningPlan.load(output).ratio == pytest.approx(0.5, abs=0.01)


def test_prune_dry_run_writes_nothing(run, inputs, tmp_path):
    result = run("prune", "-m", inputs.model, "-o", tmp_path / "out", "--dry-run", *inputs.calibration)
    assert result.status == 0 and "removed 25.00%" in result.output and "written" not in result.output
    assert listing(tmp_path) == {}


def test_prune_output_options(run, inputs, tmp_path):
    output, flags = tmp_path / "out", ["-s", inputs.statistics, "--packed", "--max-shard-size", "20KB"]
    assert run("prune", "-m", inputs.model, "-o", output, *flags).status == 0
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert "model.layers.0.mlp.experts.gate_up_proj" in index["weight_map"]


def test_prune_replaces_an_old_output_when_told(run, inputs, tmp_path):
    with replace_folder(output := tmp_path / "out") as old:
        (old / "notes.txt").write_text("old")
    before = listing(tmp_path)
    flags = ["-m", inputs.model, "-s", inputs.statistics, "-o", output]
    refused = run("prune", *flags)
    assert refused.status == 2 and "--overwrite" in refused.error
    assert listing(tmp_path) == before
    assert run("prune", *flags, "--overwrite").status == 0
    assert listing(output).keys() == listing(inputs.pruned).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_flags_override_the_recipe(run, inputs, tmp_path, suffix):
    options = {"ratio": 0.5, "criterion": "random", "min_width": 1, "dataset": str(inputs.text), "num_samples": 6}
    options["seq_length"] = 24
    recipe = tmp_path / f"recipe.{suffix}"
    if suffix == "json":
        recipe.write_text(json.dumps(options))
    else:
        recipe.write_text("".join(f"{name}: {value}\n" for name, value in options.items()))
    output = tmp_path / "out"
    result = run("prune", "-m", inputs.model, "-o", output, "-c", recipe, "--ratio", "0.3", "--criterion", "fisher")
    assert result.status == 0 and "criterion fisher" in result.output
    assert HeaprConfig.from_pretrained(output) == HeaprConfig(
        **{**options, "ratio": 0.3, "criterion": "fisher", "dataset": "text.jsonl"}
    )


def test_a_ratio_takes_the_place_of_a_size_in_the_recipe(run, inputs, tmp_path):
    (tmp_path / "recipe.yaml").write_text("target_size: 1KB\n")  # no ratio reaches that
    flags = ["-s", inputs.statistics, "--dry-run"]
    result = run("plan", *flags, "-c", tmp_path / "recipe.yaml", "--ratio", "0.3")
    assert result.status == 0 and "asked 30.00%" in result.output
    refused = run("plan", *flags, "--target-size", "1MB", "--ratio", "0.3")
    assert refused.status == 2 and "--target-size 1MB: --ratio 0.3 is given as well; leave one out" in refused.error


def test_recipe_with_an_unknown_key_suggests_the_nearest(run, inputs, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ratoi: 0.5\n")
    result = run("plan", "-s", inputs.statistics, "-o", tmp_path / "plan", "-c", recipe)
    assert result.status == 2 and 'did you mean "ratio"?' in result.error
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_evaluate_compares_models(run, inputs):
    flags = ["--dataset", inputs.text, "--seq-length", "32"]
    result = run("evaluate", "-m", inputs.model, inputs.pruned, *flags, "--json")
    assert result.status == 0 and result.error == ""
    found = json.loads(result.output)
    original, pruned = found["perplexity"]
    assert found["tasks"] == found["speed"] == []
    assert (original["model"], pruned["model"]) == (str(inputs.model), str(inputs.pruned))
    assert original["num_tokens"] == pruned["num_tokens"] > 100
    assert original["loss"] != pruned["loss"] and original["perplexity"] > 1
    assert "increase" not in original and pruned["increase"] == pytest.approx(
        pruned["loss"] - original["loss"], abs=1e-6
    )
    assert 0 < pruned["increase_standard_error"] < pruned["loss_standard_error"]
    experts = [row["experts"]["float32"] for row in found["storage"]]
    assert experts[1] < experts[0] < found["storage"][0]["weights"]["float32"]
    table = run("evaluate", "-m", inputs.model, *flags)
    assert f"{original['perplexity']:.3f}" in table.output
    assert "experts by type" in table.output and "float32" in table.output
    one = json.loads(run("evaluate", "-m", inputs.model, *flags, "--num-samples", "1", "--json").output)
    assert one["perplexity"][0]["num_tokens"] == 31


def test_evaluate_takes_models_to_the_gpu(run, inputs, monkeypatch):
    from optimum_heapr.utils import placement

    moved = []
    monkeypatch.setattr(placement, "has_accelerator", lambda: True)
    monkeypatch.setattr(placement, "default_device", lambda: moved.append("there") or "cpu")
    flags = ["--dataset", inputs.text, "--seq-length", "32", "--num-samples", "1"]
    assert run("evaluate", "-m", inputs.model, inputs.pruned, *flags).status == 0 and len(moved) == 2


def test_evaluate_compares_speed_and_size(run, inputs):
    flags = ["--speed", "--prompt-length", "12", "--new-tokens", "4", "--repetitions", "2", "--dataset", inputs.text]
    flags += ["--seq-length", "32"]
    result = run("evaluate", "-m", inputs.model, inputs.pruned, *flags, "--json")
    assert result.status == 0 and result.error == ""
    original, pruned = json.loads(result.output)["speed"]
    for folder, row in ((inputs.model, original), (inputs.pruned, pruned)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert row["parameters"] == model.num_parameters()
        assert row["checkpoint_bytes"] == (folder / "model.safetensors").stat().st_size
        assert min(row["prefill"], row["decode"]) > 0 and row["peak_bytes"] is None
        assert (row["prompt_tokens"], row["new_tokens"], row["repetitions"]) == (12, 4, 2)
    assert pruned["flops_per_token"] < original["flops_per_token"]
    measured = speed_table([{**original, "peak_bytes": 3 * 10**9}, {**pruned, "peak_bytes": 2 * 10**9}])
    assert "peak memory" in measured and "3 GB" in measured and "2 GB" in measured
    shown = run("evaluate", "-m", inputs.model, *flags[:-4]).output
    assert (
        "prefill tok/s" in shown
        and "median of 2" in shown
        and "perplexity" not in shown
        and "peak memory" not in shown
    )


@pytest.mark.parametrize(
    "flags, problem",
    [
        ([], "nothing to evaluate; name text with --dataset, --tasks, or --speed"),
        (
            ["--speed", "--prompt-length", "4000"],
            "--prompt-length 4000: with --new-tokens 64 the model has positions for 128",
        ),
        (
            ["--speed", "--prompt-length", "12", "--new-tokens", "4", "--repetitions", "0"],
            "--repetitions 0: must be at least 1",
        ),
        (["--tasks", "x", "--include-path", "nowhere"], "--include-path nowhere: no such folder"),
    ],
)
def test_evaluate_refuses(flags, problem, run, inputs):
    if "--tasks" in flags:
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    result = run("evaluate", "-m", inputs.model, *flags)
    assert result.status == 2 and problem in result.error and result.error.count("\n") == 1


def test_evaluate_takes_dense_models(run, inputs, tmp_path):
    from tests.helpers import tiny_model, tiny_tokenizer

    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    result = run("evaluate", "-m", tmp_path, "--dataset", inputs.text, "--json")
    assert result.status == 0 and json.loads(result.output)["perplexity"][0]["perplexity"] > 1


def test_inspect_compares_two_plans(run, inputs, tmp_path):
    other = tmp_path / "plan.safetensors"
    assert run("plan", "-s", inputs.statistics, "--ratio", 0.5, "--criterion", "magnitude", "-o", other).status == 0
    found = run("inspect", inputs.pruned, other)
    assert run("plan", inputs.pruned, other, "--compare").output == found.output
    assert found.status == 0, found.error
    last = next(line for line in found.output.splitlines() if line.startswith("all")).split()
    assert last[1:3] == ["75.0%", "50.0%"] and 0 < float(last[3][:-1]) <= 50
    assert "Estimates of two criteria do not compare" in found.output
    assert "100.0%" not in run("inspect", other, other).output.splitlines()[2]
    assert run("inspect", other, inputs.statistics).status == 2


def test_inspect_shows_every_artefact(run, inputs, tmp_path):
    statistics = run("inspect", inputs.statistics)
    assert statistics.status == 0 and "tokens in 9 samples" in statistics.output
    assert "importance of atomic experts, criterion heapr" in statistics.output
    plan = run("inspect", inputs.plan)
    assert plan.status == 0 and "without 25.0% of its routed atomic experts" in plan.output
    for part in ("Before and after", "What was removed where", "Importance", "Expert coverage"):
        assert part in plan.output
    pruned = run("inspect", inputs.pruned)
    assert "parameters" in pruned.output and plan.output.partition("What was removed")[2][:400] in pruned.output
    assert run("inspect", inputs.pruned / "heapr" / "report.json").output == pruned.output
    shutil.copytree(inputs.pruned, tmp_path / "old", ignore=shutil.ignore_patterns("report.*"))
    assert run("inspect", tmp_path / "old").output == plan.output


def test_prune_reports(run, inputs, tmp_path):
    """Measured on what calibration left over of the text, or on another; completions of given prompts."""
    output = tmp_path / "out"
    flags = ["--num-samples", "6", "--seq-length", "24", "--eval-samples", "3", "--prompt", "The dog", "A router"]
    result = run("prune", "-m", inputs.model, "-o", output, "--dataset", inputs.text, *flags)
    assert result.status == 0 and "measured loss" in result.output and "report.html" in result.output
    report = json.loads((output / "heapr" / "report.json").read_text())
    measured = report["loss"]["measured"]
    assert measured["held_out"] and measured["windows"] == 3 and measured["source"] == "text.jsonl"
    assert [sample["prompt"] for sample in report["samples"]] == ["The dog", "A router"]
    assert f"{measured['after']['loss']:.4f}" in (output / "heapr" / "report.html").read_text()
    card = (output / "README.md").read_text()
    assert "](heapr/kept_widths.svg)" in card and (output / "heapr" / "kept_widths.svg").is_file()
    assert "text.jsonl (held out)" in card and str(inputs.text.parent) not in card.split("## Recipe")[0]
    for name in ("report.html", "report.md"):
        assert str(tmp_path) not in (output / "heapr" / name).read_text()

    flags = ["--eval-dataset", "demo", "--eval-samples", 2]
    other = run("prune", "-m", inputs.model, "-s", inputs.statistics, "-o", tmp_path / "other", *flags)
    assert other.status == 0 and "on demo" in other.output
    none = run("prune", "-m", inputs.model, "-s", inputs.statistics, "-o", tmp_path / "none")
    assert none.status == 0 and "measured loss" not in none.output and "not measured: " in none.output
    asked = ["prune", "-m", inputs.model, "-s", inputs.statistics, "--dataset", inputs.text, "--seq-length", 24]
    same = run(*asked, "--num-samples", 9, "--eval-samples", 3, "-o", tmp_path / "same")
    assert same.status == 0 and "on text.jsonl that calibration did not see" in same.output and not same.error
    another = run(*asked, "--num-samples", 3, "--eval-samples", 3, "-o", tmp_path / "another")
    assert another.status == 0 and "on text.jsonl\n" in another.output
    assert "the statistics are of other text" in another.error, "what was held out may have been calibrated on"
    missing = run(
        "prune", "-m", inputs.model, "-s", inputs.statistics, "-o", tmp_path / "x", "--eval-dataset", "gone.jsonl"
    )
    assert missing.status == 2 and "gone.jsonl" in missing.error and not (tmp_path / "x").exists()


def test_help_of_every_command(run):
    listed = run("--help")
    assert listed.status == 0
    for command in ("calibrate", "plan", "apply", "prune", "evaluate", "inspect"):
        assert command in listed.output
        assert run(command, "--help").status == 0


def test_the_installed_command(inputs, tmp_path):
    """As a user starts it. Nothing heavy is imported before the options are checked."""
    script = shutil.which("optimum-cli", path=str(Path(sys.executable).parent))
    assert script, "optimum-cli is not installed beside this Python"
    arguments = [script, "heapr", "plan", "-s", inputs.statistics, "-o", tmp_path / "plan", "--ratio", "1.2"]
    result = subprocess.run([str(argument) for argument in arguments], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("optimum-cli heapr plan: error: --ratio 1.2") and result.stderr.count("\n") == 1
    assert listing(tmp_path) == {}


def test_two_importable_copies_are_one_command(run, monkeypatch, tmp_path, capsys):
    """As where an installed package also lies on PYTHONPATH: Optimum registers what it finds in each."""
    from optimum.commands import optimum_cli

    once = len(optimum_cli.load_optimum_namespace_cli_commands())
    here = Path(importlib.util.find_spec("optimum.commands.register.register_heapr").origin)
    for name in ("copy", "another"):
        folder = tmp_path / name / "optimum" / "commands" / "register"
        folder.mkdir(parents=True)
        shutil.copy(here, folder)
        monkeypatch.syspath_prepend(tmp_path / name)
    assert len(optimum_cli.load_optimum_namespace_cli_commands()) == once + 2

    result = run("--help")
    assert result.status == 0 and "calibrate" in result.output and result.error == ""
    result = run("inspect", "no-such-file")
    assert result.status == 2 and "no-such-file" in result.error
    monkeypatch.setattr(sys, "argv", ["optimum-cli"])
    with pytest.raises(SystemExit):
        optimum_cli.main()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["heapr"]]
    assert line.split(None, 1)[1] in HeaprCommand.COMMAND.help
