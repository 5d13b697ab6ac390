# Licensed under the Apache License, Version 2.0
"""Reports to test with: of a tiny model that was really pruned, and of a plan as large as they come."""

from __future__ import annotations

import functools
from typing import Any

from datasets import Dataset

from optimum_heapr import HeaprConfig, HeaprPruner, PruningPlan
from optimum_heapr.report.content import build_report
from tests.helpers import SENTENCES, random_statistics, tiny_model, tiny_tokenizer


@functools.cache
def measured_pruner() -> HeaprPruner:
    """A pruner that pruned and measured, with compensation. Not to be changed."""
    options = {"num_samples": 6, "seq_length": 24, "eval_samples": 4, "criterion": "obs", "compensate": True}
    pruner = HeaprPruner(tiny_model(), tiny_tokenizer(), HeaprConfig(ratio=0.4, **options))
    pruner.calibrate(Dataset.from_dict({"text": list(SENTENCES * 6)}))
    pruner.prune()
    return pruner


@functools.cache
@functools.cache
def large_report(layers: int = 48, experts: int = 128, width: int = 768) -> dict[str, Any]:
    """As of Qwen3-30B-A3B, with everything in it that grows with the model. Made once: not to be changed."""
    statistics = random_statistics(layers, experts, width, unreached={3: [5, 99], 20: [0]})
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=0.5))
    plan.compensation = {path: [(0.3, 0.1)] * len(kept) for path, kept in plan.kept.items()}
    return build_report(plan, "a/large-model")
