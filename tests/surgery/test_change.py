# Licensed under the Apache License, Version 2.0
"""Cutting in memory takes the weights and one layer at most, and a cut that broke off leaves a model that says so."""

import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.surgery import apply, selection, stock
from optimum_heapr.surgery.apply import apply_plan
from optimum_heapr.surgery.change import whole_or_refused
from tests.helpers import calibration_data, random_ids, tiny_model
from tests.memory import LiveBytes


LAYERS = 6


def model_and_plan(model_type: str, **options):
    model = tiny_model(model_type, num_hidden_layers=LAYERS)
    statistics = calibrate(model, calibration_data(24, 24), gram=options.get("compensate", False))
    return model, PruningPlan.build(statistics, HeaprConfig(ratio=0.25, **options)), statistics


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("layout", ["variable", "uniform", "padded"])
def test_at_most_the_weights_and_one_layer_are_in_memory(layout, model_type):
    options = {"allocation": "uniform"} if layout == "uniform" else {}
    model, plan, _ = model_and_plan(model_type, layout=layout, **options)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].mlp.experts.parameters())
    watched = LiveBytes(model.parameters())
    assert watched.most == weights
    held = [block.module for block in apply.check_plan(model, plan)]  # as whoever looked for them before may do
    with watched:
        apply_plan(model, plan)
    # Beside the new layer one expert of it is there, in a few forms while it is cut.
    assert watched.most <= weights + layer + 4 * layer // model.model.layers[0].mlp.experts.num_experts
    assert watched.now() <= sum(parameter.nbytes for parameter in model.parameters()) + layer // 6
    assert len(held) == LAYERS


def used_in(model):
    """Everything that a user may try next."""
    ids = random_ids(1, 4)
    plain = HeaprConfig(ratio=0.5)
    return {
        "forward": lambda folder: model(input_ids=ids),
        "body": lambda folder: model.base_model(input_ids=ids),
        "generate": lambda folder: model.generate(ids),
        "save": lambda folder: model.save_pretrained(folder),
        "weights": lambda folder: model.state_dict(),
        "prune": lambda folder: HeaprPruner(model, config=plain),
        "calibrate": lambda folder: calibrate(model, calibration_data(8)),
    }


BREAKS = {
    "cutting": (selection, "packed_rows", {}),
    "cutting to a stock layout": (stock, "padded_expert", {"layout": "padded"}),
    "compensating": (apply, "compensate_experts", {"compensate": True}),
    "compensating over blocks": (apply, "set_rows", {"compensate": True, "compensation_scope": "block"}),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_cut_that_broke_off_leaves_a_model_that_says_so(how, monkeypatch, tmp_path):
    module, name, options = BREAKS[how]
    model, plan, statistics = model_and_plan("qwen3_moe", **options)
    function, calls = getattr(module, name), []

    def short_of_memory(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
        return function(*arguments)

    pruner = HeaprPruner(model)
    monkeypatch.setattr(module, name, short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        apply_plan(model, plan, statistics, calibration_data(24, 24))
    monkeypatch.undo()
    uses = used_in(model) | {
        "apply again": lambda folder: pruner.apply(plan, statistics),
        "save by the pruner": lambda folder: pruner.save_pretrained(folder),
    }
    for use in uses.values():
        with pytest.raises(
            HeaprError, match=r"broke off in the middle \(OutOfMemoryError: Tried.*load it again.*file by file"
        ):
            use(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_is_refused_before_the_first_change_leaves_the_model_as_it_was():
    model = tiny_model()
    with pytest.raises(HeaprError, match="not today"):
        with whole_or_refused(model):
            raise HeaprError("not today")
    for use in ("forward", "prune", "weights"):
        used_in(model)[use](None)
