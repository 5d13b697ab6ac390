# Licensed under the Apache License, Version 2.0
"""Every recipe is a valid configuration, says the ratio that its name promises, and the one that can run here does."""

import re
from pathlib import Path

import pytest

from optimum_heapr import HeaprConfig, HeaprPruner, RecoveryConfig


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PRUNING = sorted(RECIPES.rglob("prune_*.yaml"))
RECOVERY = sorted(RECIPES.rglob("recover_*.yaml"))


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
    fewer = {"max_steps": 2, "eval_steps": 2, "num_samples": 12, "seq_length": 64}
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
