# Licensed under the Apache License, Version 2.0
"""Every recipe is a valid configuration, says the ratio that its name promises, and the one that can run here does."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from optimum_heapr import HeaprConfig, HeaprPruner, RecoveryConfig
from tests.helpers import tiny_model


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PRUNING = sorted(RECIPES.rglob("prune_*.yaml"))
RECOVERY = sorted(RECIPES.rglob("recover_*.yaml"))


# Two steps, each of two micro-batches where a recipe has several.
STEPS = {"max_steps": 2, "eval_steps": 2, "batch_size": 2, "micro_batch_size": 1}


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES))


@pytest.mark.parametrize("path", PRUNING, ids=name_of)
def test_a_recipe_is_a_configuration(path):
    config = HeaprConfig.from_file(path)
    assert f"{config.ratio:.0%}" == re.search(r"prune_(\d+)\.yaml", path.name)[1] + "%"
    assert config.dataset is not None


@pytest.mark.parametrize("path", RECOVERY, ids=name_of)
def test_a_recipe_of_recovery_is_a_configuration(path):
    config = RecoveryConfig.from_file(path)
    assert config.distills == (path.name == "recover_distill.yaml")
    assert config.dataset is not None


def test_every_folder_explains_itself_and_has_all_kinds():
    folders = {path.parent for path in PRUNING}
    assert len(folders) == 6 and len(PRUNING) >= 10
    for folder in folders:
        assert (folder / "README.md").is_file()
        assert {"recover_lora.yaml", "recover_distill.yaml"} <= {
            path.name for path in RECOVERY if path.parent == folder
        }
    assert set(PRUNING) | set(RECOVERY) == set(RECIPES.rglob("*.yaml"))


def test_the_recipes_of_the_demonstration_run():
    config = HeaprConfig.from_file(RECIPES / "demo" / "prune_25.yaml").replace(num_samples=4)
    pruner = HeaprPruner.from_pretrained("demo", config, dtype="float32")
    pruner.prune()
    assert pruner.applied_plan.ratio == pytest.approx(0.25)
    assert pruner.applied_plan.compensation
    # What a few steps win is for tests/recovery to say; this is about the recipes being of use as they are.
    fewer = {**STEPS, "num_samples": 12, "seq_length": 64}
    before = "pruned and compensated"
    for name, teacher, after in (
        ("recover_lora.yaml", None, "recovered"),
        ("recover_distill.yaml", "demo", "recovered by distillation"),
    ):
        report = pruner.recover(
            config=RecoveryConfig.from_file(RECIPES / "demo" / name).replace(**fewer), teacher=teacher
        )
        assert report.steps == 2 and {before, after} <= set(report.stages)
        before = "recovered before" if report.improved else before


# What is small, of the family that a folder is for; the demonstration runs above as it is.
MODEL_TYPES = {
    "deepseek-moe-16b-base": "deepseek",
    "moe-a": "qwen3_moe",
    "qwen1.5-moe-a2.7b-chat": "qwen2_moe",
    "qwen2-57b-a14b": "qwen2_moe",
    "qwen3-30b-a3b": "qwen3_moe",
}


@pytest.mark.parametrize("folder", MODEL_TYPES)
def test_the_recipes_for_a_model_run_on_a_small_one_of_its_family(folder):
    """Two steps, in the dtypes that they name; bfloat16 weights meet every alignment that a kernel asks for."""
    rows = Dataset.from_dict({"input_ids": [[(3 * row + k) % 40 for k in range(16)] for row in range(16)]})
    for path in sorted((RECIPES / folder).glob("prune_*.yaml")):
        model, teacher = (tiny_model(MODEL_TYPES[folder], dtype=torch.bfloat16) for _ in range(2))
        fewer = {"num_samples": 8, "seq_length": 16, "eval_samples": 0, "align_for": "none"}  # no 128 in experts of 12
        config = HeaprConfig.from_file(path)
        config = config.replace(**fewer, reconstruction_steps=min(config.reconstruction_steps, 2))
        pruner = HeaprPruner(model, config=config)
        pruner.calibrate(rows)
        pruner.prune()
        assert pruner.applied_plan.ratio == pytest.approx(config.ratio, abs=0.01)
    for path in sorted((RECIPES / folder).glob("recover_*.yaml")):
        config = RecoveryConfig.from_file(path)
        assert config.batch_size % config.micro_batch_size == 0
        config = config.replace(**STEPS, num_samples=16, seq_length=16)
        report = pruner.recover(rows, config, teacher if config.distills else None)
        assert report.steps == 2


def test_every_folder_is_run():
    assert {path.parent.name for path in PRUNING} == {"demo", *MODEL_TYPES}
