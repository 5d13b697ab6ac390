# Licensed under the Apache License, Version 2.0
"""What is ours lives in `heapr/`; a checkpoint of the first version, which has it in the root, is read all the same."""

import json
import shutil

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from optimum_heapr import HeaprConfig, HeaprPruner, PruningPlan
from optimum_heapr.checkpoints.saving import apply_streaming
from optimum_heapr.hub.push import push_folder
from optimum_heapr.recovery.output import plan_of
from tests.cli.conftest import listing


@pytest.fixture
def old(inputs, tmp_path):
    """A folder as the first version wrote it."""
    folder = tmp_path / "old"
    shutil.copytree(inputs.pruned, folder)
    (folder / "heapr" / "files.json").unlink()  # which that one did not write
    for path in (folder / "heapr").iterdir():
        path.rename(folder / path.name)
    (folder / "heapr").rmdir()
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("](heapr/kept_widths.svg)", "](kept_widths.svg)"))
    return folder


@pytest.mark.parametrize("layout", ["variable", "uniform", "padded"])
def test_the_root_has_no_safetensors_but_weights(layout, inputs, tmp_path):
    """Without an index beside them vLLM reads every `*.safetensors` there."""
    config = HeaprConfig(ratio=0.25, layout=layout)
    pruner = HeaprPruner.from_pretrained(inputs.model, config, statistics=inputs.statistics)
    pruner.prune()
    pruner.save_pretrained(tmp_path / "memory")
    apply_streaming(inputs.model, pruner.applied_plan, tmp_path / "stream")
    for name, ours in (("memory", {"plan.safetensors", "statistics.safetensors"}), ("stream", {"plan.safetensors"})):
        assert [path.name for path in (tmp_path / name).glob("*.safetensors")] == ["model.safetensors"]
        assert {path.name for path in (tmp_path / name / "heapr").glob("*.safetensors")} == ours
        assert not list((tmp_path / name).glob("*report*"))


def test_both_forms_give_the_same(run, inputs, old, tmp_path):
    assert PruningPlan.load(old).widths == plan_of(old).widths == PruningPlan.load(inputs.pruned).widths
    assert run("inspect", old).output == run("inspect", inputs.pruned).output != ""
    plans = [run("plan", "-s", folder, "--ratio", 0.5, "--dry-run") for folder in (old, inputs.pruned)]
    assert plans[0].status == 0 and plans[0].output == plans[1].output
    for plan, output in ((old, "one"), (inputs.pruned, "two")):
        assert run("apply", "-m", inputs.model, "-p", plan, "-o", tmp_path / output).status == 0
    assert listing(tmp_path / "one") == listing(tmp_path / "two")


def test_a_recovered_model_of_the_old_form_has_the_new_one(run, inputs, old, tmp_path):
    rows = [[(3 * row + k) % 40 for k in range(12)] for row in range(24)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    flags = ["--dataset", tmp_path / "text.jsonl", "--seq-length", 12, "--num-samples", 24, "--max-steps", 2]
    result = run("recover", "-m", old, *flags, "--learning-rate", 0.01, "--merge", "-o", tmp_path / "merged")
    assert result.status == 0 and "written" in result.output, result.error
    expected = set(listing(inputs.pruned)) - {"heapr/statistics.safetensors"} | {"heapr/recovery_report.json"}
    assert set(listing(tmp_path / "merged")) == expected
    assert "](heapr/kept_widths.svg)" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("with_statistics", [False, True])
def test_pushing_replaces_the_old_form(with_statistics, old, monkeypatch):
    """Of the folder, and of what was in the repository before."""
    before = ["README.md", "statistics.safetensors", "plan.safetensors", "report.html", "heapr/gone.json", "notes.md"]
    committed = {}

    def commit(api, repo_id, operations, **options):
        for operation in operations:
            committed.setdefault(type(operation).__name__, set()).add(operation.path_in_repo)
            if operation.path_in_repo == "README.md":
                committed["card"] = operation.path_or_fileobj.decode()

    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **options: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *arguments, **options: before)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    push_folder(old, "me/model", with_statistics=with_statistics)
    added = committed["CommitOperationAdd"]
    assert {name for name in added if name.endswith(".safetensors")} == {
        "model.safetensors",
        "heapr/plan.safetensors",
    } | ({"heapr/statistics.safetensors"} if with_statistics else set())
    assert committed["CommitOperationDelete"] == set(before) - {"README.md", "notes.md"}
    assert "](heapr/kept_widths.svg)" in committed["card"]


def test_commands_refuse_a_model_that_lacks_weights(run, inputs, tmp_path):
    """In every mode by one and the same line."""
    folder = tmp_path / "damaged"
    shutil.copytree(inputs.model, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, output = ["-m", folder], ["-o", tmp_path / "out"]
    commands = [
        *(
            ["calibrate", *model, *inputs.calibration, *output, "--memory", memory]
            for memory in ("plain", "streaming")
        ),
        *(["prune", *model, *inputs.calibration, *output, "--memory", memory] for memory in ("auto", "offload")),
        *(["apply", *model, "-p", inputs.plan, *output, *flags] for flags in ([], ["--in-memory"])),
        ["evaluate", *model, "--dataset", inputs.text],
        ["prune", "-m", inputs.model, *output, "-s", inputs.statistics, "--layout", "uniform"],
    ]
    for command in commands[:-1]:
        result = run(*command)
        assert result.status == 2 and result.error.count("\n") == 1, result.error
        assert "its checkpoint lacks 2 of its tensors" in result.error and "model.norm.weight" in result.error
        assert "layers.0.mlp.experts.2.up_proj.weight" in result.error
    assert run(*commands[-1]).status == 0  # what is whole goes on
