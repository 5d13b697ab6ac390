# Licensed under the Apache License, Version 2.0
"""What may leave this machine names nothing of it: every byte of what is written beside weights, and of what is pushed."""

import json
import shutil
from pathlib import Path

import pytest
import transformers

from optimum_heapr import HeaprConfig, HeaprPruner, PruningPlan
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.hub.push import push_folder
from optimum_heapr.utils.errors import HeaprError
from tests.cli.conftest import listing
from tests.helpers import random_ids


QUICK = ("--max-steps", 2, "--eval-steps", 2, "--batch-size", 4, "--learning-rate", "1e-2", "--rank", 4)
QUICK = (*QUICK, "--seq-length", 12, "--num-samples", 24, "--held-out", 0.2)


@pytest.fixture(scope="module")
def place(inputs, tmp_path_factory) -> Path:
    """A folder whose name is nobody's business, with a model, texts and a plan in it."""
    place = tmp_path_factory.mktemp("client-of-mine")
    shutil.copytree(inputs.model, place / "model")
    shutil.copy(inputs.text, place / "text.jsonl")
    rows = [[(3 * row + k) % 40 for k in range(12)] for row in range(24)]
    (place / "counting.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return place


def assert_names_nothing(files: dict[str, bytes | None], place: Path) -> None:
    assert files
    for name, content in files.items():
        for secret in (str(place), str(place.parent), place.name):
            assert secret.encode() not in (content or b""), f"{name} names {secret}"


def calibration(place) -> list:
    mixture = f"{place / 'text.jsonl'}:0.5,{place / 'counting.jsonl'}:0.5"
    return ["--dataset", mixture, "--eval-dataset", place / "text.jsonl", "--num-samples", 8, "--seq-length", 16]


@pytest.mark.parametrize("flags", [[], ["--layout", "uniform"], ["--memory", "streaming"]], ids=" ".join)
def test_no_path_is_in_a_pruned_folder(flags, run, place, tmp_path):
    result = run("prune", "-m", place / "model", "-o", tmp_path / "out", *calibration(place), *flags)
    assert result.status == 0, result.error
    written = listing(tmp_path / "out")
    assert_names_nothing(written, place)
    names = json.loads(written["heapr/heapr_config.json"])
    assert names["dataset"] == "text.jsonl:0.5,counting.jsonl:0.5" and names["eval_dataset"] == "text.jsonl"
    assert "text.jsonl" in written["README.md"].decode()  # the name itself is said


def test_steps_find_the_text_again_and_their_output_does_not_say_where(run, place, tmp_path):
    """A plan that is saved as a file of its own is the user's, and keeps the path."""
    config = HeaprConfig(dataset=str(place / "text.jsonl"), num_samples=8, seq_length=16, compensate=True)
    pruner = HeaprPruner.from_pretrained(place / "model", config.replace(compensation_scope="block"))
    statistics = pruner.calibrate()
    statistics.save(tmp_path / "statistics.safetensors")
    assert_names_nothing({"statistics": (tmp_path / "statistics.safetensors").read_bytes()}, place)
    pruner.plan().save(tmp_path / "plan.safetensors")
    flags = ["-m", place / "model", "-p", tmp_path / "plan.safetensors"]
    for way in ([], ["--in-memory"]):
        assert run("apply", *flags, "-o", tmp_path / "out", "--overwrite", *way).status == 0
        assert_names_nothing(listing(tmp_path / "out"), place)
    assert PruningPlan.load(tmp_path / "out" / "heapr" / "plan.safetensors").config.dataset == "text.jsonl"
    pruner.apply(pruner.plan()).save_pretrained(tmp_path / "by-transformers")
    assert_names_nothing(listing(tmp_path / "by-transformers"), place)


def test_no_path_is_in_what_recovery_writes_or_in_what_is_pushed(run, inputs, place, tmp_path, monkeypatch):
    pruned = Path(shutil.copytree(inputs.pruned, place / "pruned"))
    flags = ["-m", pruned, "--dataset", place / "counting.jsonl", "--teacher", place / "model", *QUICK]
    for output, merge in (("merged", ["--merge"]), ("adapter", [])):
        assert run("recover", *flags, *merge, "-o", tmp_path / output).status == 0
        assert_names_nothing(listing(tmp_path / output), place)

    # The adapter names its model, which is found beside it, and where it is not that is said.
    shutil.copytree(pruned, tmp_path / "pruned")
    if transformers.__version__.startswith("5.17."):  # which would leave out the routers that were trained
        with pytest.raises(HeaprError, match="modules_to_save"):
            load_model(tmp_path / "adapter")
    else:
        logits = load_model(tmp_path / "adapter")[0](input_ids=random_ids()).logits
        assert logits.isfinite().all()
    (tmp_path / "pruned").rename(tmp_path / "elsewhere")
    with pytest.raises(HeaprError, match="is an adapter of 'pruned', and no such folder is here or beside it"):
        load_model(tmp_path / "adapter")

    sent = {}

    def create_commit(api, repo_id, operations, **options):
        for operation in operations:
            file = operation.path_or_fileobj
            sent[operation.path_in_repo] = file if isinstance(file, bytes) else Path(file).read_bytes()

    from types import SimpleNamespace

    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **options: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "list_repo_files", lambda api, name, **options: [])
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    push_folder(tmp_path / "merged", "me/merged", with_statistics=True)
    push_folder(inputs.pruned, "me/pruned", with_statistics=True)
    assert {"README.md", "heapr/plan.safetensors", "heapr/statistics.safetensors"} <= set(sent)
    assert_names_nothing(sent, place)
    assert_names_nothing(sent, inputs.text.parent)
