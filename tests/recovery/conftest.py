# Licensed under the Apache License, Version 2.0
"""A pruned model on disk, what it was pruned from, and text for both."""

import copy
import functools
import json
from types import SimpleNamespace

import datasets
import pytest

from optimum_heapr import HeaprConfig, HeaprPruner, RecoveryConfig
from optimum_heapr.recovery.data import RecoveryData
from optimum_heapr.recovery.runner import recover
from optimum_heapr.recovery.state import RunFolder
from optimum_heapr.recovery.teacher import Teacher
from tests.helpers import tiny_model


# Numbers counted up and round: what can be learned from some rows holds for others, so that a few steps show.
ROWS = datasets.Dataset.from_dict({"input_ids": [[(3 * row + k) % 40 for k in range(16)] for row in range(30)]})

QUICK = {
    "rank": 4,
    "max_steps": 6,
    "eval_steps": 3,
    "batch_size": 4,
    "micro_batch_size": 2,
    "num_samples": 30,
    "seq_length": 16,
    "learning_rate": 1e-2,
    "held_out": 0.2,
}
DISTILLATION = {"distillation_weight": 1.0}


def quick(**options) -> RecoveryConfig:
    return RecoveryConfig(**{**QUICK, **options})


def prune(family: str, **options):
    """A pruner with a tiny model of a family, pruned; each that is asked for is a copy."""
    config = HeaprConfig(**{"ratio": 0.34, "num_samples": 30, "seq_length": 16, **options})
    return copy.deepcopy(_pruned(family, json.dumps(config.to_dict())))


@functools.cache
def _pruned(family: str, config: str) -> HeaprPruner:
    pruner = HeaprPruner(tiny_model(family), None, HeaprConfig(**json.loads(config)))
    pruner.calibrate(ROWS)
    pruner.prune()
    return pruner


def run(model, folder, teacher=None, plan=None, resume=False, data=None, **options):
    """A recovery of `model`, which is changed in place."""
    config = quick(**options)
    data, folder = data or RecoveryData.load(config, None, ROWS), RunFolder(folder, resume)
    taught = None if teacher is None else Teacher.prepare(teacher, model, config, data, folder, plan)
    return recover(model, config, data, folder, taught, plan)


@pytest.fixture(scope="session")
def pruned(tmp_path_factory):
    """`base`, `model` (make a copy before training it), its `plan`, and the `folder` that it was saved to."""
    pruner = prune("qwen3_moe", criterion="obs", compensate=True)
    folder = tmp_path_factory.mktemp("recovery") / "pruned"
    pruner.save_pretrained(folder)
    return SimpleNamespace(base=tiny_model("qwen3_moe"), model=pruner.model, plan=pruner.applied_plan, folder=folder)


@pytest.fixture
def model(pruned):
    return copy.deepcopy(pruned.model)
