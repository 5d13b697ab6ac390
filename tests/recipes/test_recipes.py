# Licensed under the Apache License, Version 2.0
"""Every recipe is a valid configuration, says the ratio that its name promises, and the one that can run here does."""

import re
from pathlib import Path

import pytest

from optimum_heapr import HeaprConfig, HeaprPruner


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_recipe_is_a_configuration(path):
    config = HeaprConfig.from_file(path)
    assert f"{config.ratio:.0%}" == re.search(r"prune_(\d+)\.yaml", path.name)[1] + "%"
    assert config.dataset is not None


def test_every_folder_explains_itself():
    assert len(FILES) >= 8
    assert all((path.parent / "README.md").is_file() for path in FILES)


def test_the_recipe_of_the_demonstration_runs():
    config = HeaprConfig.from_file(RECIPES / "demo" / "prune_25.yaml").replace(num_samples=4)
    pruner = HeaprPruner.from_pretrained("demo", config, dtype="float32")
    pruner.prune()
    assert pruner.applied_plan.ratio == pytest.approx(0.25)
    assert pruner.applied_plan.compensation
