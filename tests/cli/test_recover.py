# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr recover`: adapter or merged model, one line for each mistake, one result for any number of processes."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from optimum_heapr.checkpoints.loading import load_model
from tests.cli.conftest import listing
from tests.helpers import random_ids, tiny_model
from tests.processes import OPTIMUM_CLI, in_two_processes


QUICK = ("--max-steps", 2, "--eval-steps", 1, "--batch-size", 4, "--micro-batch-size", 2, "--learning-rate", "1e-2")
QUICK = (*QUICK, "--rank", 4, "--seq-length", 12, "--num-samples", 24, "--held-out", 0.2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Numbers counted up and round, which a few steps learn something of."""
    path = tmp_path_factory.mktemp("text") / "counting.jsonl"
    rows = [[(3 * row + k) % 40 for k in range(12)] for row in range(24)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def test_an_adapter_and_a_merged_model(run, inputs, text, tmp_path):
    command = ["recover", "-m", inputs.pruned, "--dataset", text, *QUICK]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("targets: experts\ndistillation_weight: 0.5\n")
    teacher = ["--teacher", inputs.model, "-c", recipe]
    result = run(*command, *teacher, "-o", tmp_path / "adapter")
    assert result.status == 0, result.error
    assert "Adapter of step 2 of 2 written to" in result.output and "recovered by distillation" in result.output
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(listing(tmp_path / "adapter"))
    result = run(*command, "--merge", "-o", tmp_path / "merged")
    assert result.status == 0 and "Merged model of step 2 of 2 written to" in result.output
    files, merged = set(listing(inputs.pruned)), set(listing(tmp_path / "merged"))
    assert files - merged == {"heapr/statistics.safetensors"} and merged - files == {"heapr/recovery_report.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged", "recipe.yaml"]
    shutil.copytree(inputs.pruned, tmp_path / "pruned")  # the adapter knows its model by this name
    evaluation = run("evaluate", "-m", tmp_path / "merged", tmp_path / "adapter", "--dataset", text, "--json")
    assert evaluation.status == 0 and len(json.loads(evaluation.output)["perplexity"]) == 2
    model, _ = load_model(inputs.pruned)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model, tmp_path / "adapter")(input_ids=random_ids()).logits
        loaded = load_model(tmp_path / "adapter")[0](input_ids=random_ids()).logits
    torch.testing.assert_close(loaded, expected)


def test_nothing_is_written_if_nothing_improved(run, inputs, tmp_path):
    flags = ["--dataset", inputs.tokens, *QUICK, "--learning-rate", 10]
    result = run("recover", "-m", inputs.pruned, "-o", tmp_path / "out", *flags)
    assert result.status == 0 and "Nothing improved in 2 steps; nothing was written" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--distillation-weight", 1], "--teacher: --distillation-weight 1.0 needs the unpruned model; name it with"),
        (["--targets", "expert"], "--targets expert: must be one of attention, experts, router, all"),
        (["--dropout", 0.1], "--dropout 0.1: PEFT has no dropout for LoRA on parameters"),
        (["--batch-size", 3], "--micro-batch-size 2: must divide --batch-size 3"),
    ],
)
def test_mistakes_are_one_line(run, inputs, text, tmp_path, flags, expected):
    result = run("recover", "-m", inputs.pruned, "-o", tmp_path / "out", "--dataset", text, *QUICK, *flags)
    assert result.status == 2 and expected in result.error and len(result.error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_wrong_models_and_outputs_are_refused(run, inputs, text, tmp_path):
    flags = ["--dataset", text, *QUICK]
    result = run("recover", "-m", inputs.model, "-o", tmp_path / "out", *flags)
    assert result.status == 2 and "has no heapr_config; name a model that was pruned" in result.error
    tiny_model("qwen3_moe", vocab_size=64).save_pretrained(tmp_path / "other")
    teaches = ["--teacher", tmp_path / "other", "--distillation-weight", 1, "--cache-teacher"]
    result = run("recover", "-m", inputs.pruned, *teaches, "-o", tmp_path / "out", *flags)
    assert result.status == 2 and "has a vocabulary of 64, the pruned model one of 320" in result.error
    result = run("recover", "-m", inputs.pruned, "-o", inputs.pruned, "--overwrite", *flags)
    assert result.status == 2 and "is the input" in result.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(run, inputs, text, tmp_path):
    command = [
        "recover",
        "-m",
        inputs.pruned,
        "--dataset",
        text,
        *QUICK,
        "--micro-batch-size",
        1,
        "--teacher",
        inputs.model,
    ]
    command += ["--distillation-weight", 1, "--cache-teacher", "--weight-interpolation", 0.5]
    command = list(map(str, command))
    alone = run(*command, "-o", tmp_path / "one")
    assert alone.status == 0, alone.error
    processes = in_two_processes(OPTIMUM_CLI, "heapr", *command, "-o", tmp_path / "two")
    assert [process.returncode for process in processes] == [0, 0], [process.stderr for process in processes]
    assert [process.stdout.count("Adapter of step") for process in processes] == [1, 0]
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-4)
    reports = [json.loads((tmp_path / name / "heapr" / "recovery_report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["stages"] == pytest.approx(reports[1]["stages"], abs=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
