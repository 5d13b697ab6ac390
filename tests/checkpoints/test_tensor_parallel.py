# Licensed under the Apache License, Version 2.0
"""What does not go with a model that is split over processes is refused before any of it is loaded."""

import pytest
from transformers import AutoModelForCausalLM

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner
from optimum_heapr.checkpoints import tensor_parallel
from optimum_heapr.checkpoints.tensor_parallel import spreading_options
from tests.helpers import tiny_model


REFUSED = {
    "memory": (
        {"memory": "streaming"},
        "memory='streaming': with tp_plan='auto' each process has some of the weights",
    ),
    "devices": ({"device_map": "auto"}, "device_map='auto': with tp_plan='auto' each process"),
    "quantized": ({"dequantize": True}, "dequantize=True: with tp_plan='auto' each process"),
    "plan": ({"tp_plan": "expert"}, "tp_plan='expert': must be auto or experts; did you mean \"experts\"?"),
    "search": (
        {"config": HeaprConfig(max_loss_increase=0.1)},
        "max_loss_increase=0.1: plans are measured with the model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case, monkeypatch):
    changes, message = REFUSED[case]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HeaprError) as error:
        HeaprPruner.from_pretrained("/not/here", **{"tp_plan": "auto", **changes})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("option", ["tp_plan", "distributed_config"])
def test_one_process_is_refused(option):
    with pytest.raises(
        HeaprError, match="there is one process to split the model over; start several, with torchrun.* no GPUs"
    ):
        HeaprPruner.from_pretrained("/not/here", **{option: "auto"})


def test_processes_that_are_not_connected_are_refused(monkeypatch):
    """accelerate leaves processes on CPUs alone unless it is told to use them."""
    monkeypatch.setattr(tensor_parallel, "_processes", lambda: 2)
    model = tiny_model()
    with pytest.raises(HeaprError, match="accelerate connects 1 of 2 processes; on CPUs set ACCELERATE_USE_CPU=true"):
        spreading_options(AutoModelForCausalLM, model.config, "tiny", "auto")


def test_experts_alone_are_split():
    """Of the plan that transformers has, all else is overridden."""
    model = tiny_model()
    plan = spreading_options(AutoModelForCausalLM, model.config, "tiny", "experts")["distributed_config"].tp_plan
    split = {rule: style for rule, style in plan.items() if style != "replicate"}
    path = "model.layers.*.mlp.experts"
    assert split == {f"{path}.gate_up_proj": "packed_colwise", f"{path}.down_proj": "rowwise", path: "moe_tp_experts"}
