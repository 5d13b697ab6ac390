# Licensed under the Apache License, Version 2.0
"""Which layer made the loss jump: the demonstration model, with one layer ruined by statistics that say it does nothing."""

import copy
import logging

import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.evaluation.perplexity import window_losses
from optimum_heapr.report.jump import jump_text
from optimum_heapr.surgery.apply import apply_plan


CONFIG = HeaprConfig(dataset="demo", num_samples=12, seq_length=96, eval_samples=16, ratio=0.25)
RUINED = "model.layers.2"


@pytest.fixture(autouse=True)
def nothing_but_the_loss(monkeypatch):
    """Speed and completions take most of the time of looking at a model."""
    for look in ("_see_speed", "_see_completions"):
        monkeypatch.setattr(f"optimum_heapr.report.observation.{look}", lambda seen, model, workload: None)


def ruined(changes=None, path=f"{RUINED}.mlp.experts"):
    """A pruner whose plans take what they can from one layer: what its atomic experts did in calibration is made small."""
    pruner = HeaprPruner.from_pretrained("demo", CONFIG.replace(**(changes or {})), dtype="float32")
    block = pruner.calibrate().blocks[path]
    block.activation_sq_sum *= 1e-9
    return pruner


def test_a_layer_that_was_ruined_is_named(heapr_log):
    pruner = ruined()
    unpruned, data = copy.deepcopy(pruner.model), pruner.calibration_data
    with heapr_log.at_level(logging.WARNING, "optimum"):
        pruner.prune()
    plan, loss = pruner.applied_plan, pruner.report["loss"]
    assert sum(plan.widths[f"{RUINED}.mlp.experts"]) == 0 and loss["estimated_increase"] < 1e-3
    found = loss["jump"]
    assert found["layer"] == RUINED and found["windows"] == 4
    # All that was removed is in that layer: with it the model is the unpruned one.
    assert found["restored"] == pytest.approx(0, abs=1e-5) and found["increase"] > loss["measured"]["increase"] > 0.1
    assert f"{RUINED} did it" in heapr_log.text and "estimate of 0.0000" in heapr_log.text
    assert jump_text(pruner.report) in heapr_log.text

    # The model is as it was cut: the layers that were put back are gone.
    cut, windows = apply_plan(copy.deepcopy(unpruned), plan), data.held_out[:2]
    assert window_losses(pruner.model, windows) == pytest.approx(window_losses(cut, windows), rel=1e-5)


def test_what_is_left_is_what_the_rest_of_the_plan_costs():
    pruner = ruined({"ratio": 0.28, "compensate": True, "criterion": "heapr"})
    unpruned, statistics, windows = copy.deepcopy(pruner.model), pruner.statistics, pruner.calibration_data.held_out
    windows = windows[: CONFIG.eval_samples]
    pruner.prune()
    found, plan = pruner.report["loss"]["jump"], copy.deepcopy(pruner.applied_plan)
    path = f"{RUINED}.mlp.experts"
    plan.kept[path] = [torch.arange(plan.original_width[path]) for _ in plan.kept[path]]
    whole = window_losses(unpruned, windows)
    with_layer = window_losses(apply_plan(unpruned, plan, statistics), windows)
    without = window_losses(pruner.model, windows)
    worst = sorted(range(len(windows)), key=lambda index: whole[index] - without[index])[
        :4
    ]  # windows are of equal length
    tokens = sum(len(windows[index]) - 1 for index in worst)
    assert found["layer"] == RUINED
    assert found["restored"] == pytest.approx(
        sum(with_layer[index] - whole[index] for index in worst) / tokens, abs=1e-5
    )
    assert found["increase"] == pytest.approx(sum(without[index] - whole[index] for index in worst) / tokens, abs=1e-5)


def test_layers_that_lost_experts_of_the_router_are_put_back_with_it(monkeypatch):
    monkeypatch.setattr("optimum_heapr.report.jump.BEYOND", 0.1)
    monkeypatch.setattr("optimum_heapr.report.jump.MATTERS", 0.0)
    changes = {"layout": "uniform", "num_experts": "8", "ratio": 0.75}
    pruner = HeaprPruner.from_pretrained("demo", CONFIG.replace(**changes), dtype="float32")
    pruner.prune()
    found = pruner.report["loss"]["jump"]
    assert found["layer"].startswith("model.layers.")
    assert found["increase"] / 4 < found["restored"] < found["increase"]
    assert "no layer did it alone" in jump_text(pruner.report)


def test_a_sane_pruning_says_nothing():
    pruner = HeaprPruner.from_pretrained("demo", CONFIG, dtype="float32")
    pruner.prune()
    assert "measured" in pruner.report["loss"] and "jump" not in pruner.report["loss"]
    assert jump_text(pruner.report) is None


def test_a_model_that_changed_since_it_was_loaded_is_not_mixed_with_its_checkpoint():
    pruner = ruined()
    with torch.no_grad():
        pruner.model.model.layers[1].self_attn.q_proj.weight *= 1.01
    pruner.statistics = None
    statistics = pruner.calibrate()
    statistics.blocks[f"{RUINED}.mlp.experts"].activation_sq_sum *= 1e-9
    pruner.prune()
    reason = pruner.report["loss"]["jump"]["unknown"]
    assert reason.startswith("model.layers.1.self_attn.q_proj.weight: is not as in the checkpoint")


def test_a_model_made_in_code_has_no_layers_to_put_back():
    of_disk = ruined()
    pruner = HeaprPruner(of_disk.model, of_disk.tokenizer, of_disk.config)
    pruner.statistics, pruner.calibration_data = of_disk.statistics, of_disk.calibration_data
    pruner.prune()
    assert "was not loaded by from_pretrained" in pruner.report["loss"]["jump"]["unknown"]
    assert "which layer did it was not found out" in jump_text(pruner.report)
