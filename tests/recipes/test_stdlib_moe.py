# Licensed under the Apache License, Version 2.0
"""The recipe that trains a model of many narrow experts: it trains, goes on where it was interrupted, and what it writes loads."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.utils.errors import HeaprError


SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "stdlib-moe" / "train.py"
SMALL = ["--steps", "3", "--save-steps", "1", "--batch-size", "1"]  # the first has the learning rate 0


@pytest.fixture
def recipe(monkeypatch):
    """The script as a module, with little text."""
    spec = importlib.util.spec_from_file_location("stdlib_moe_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts = {split: [text[:3000] for text in module.demo_texts(split)[:3]] for split in ("calibration", "evaluation")}
    texts["train"] = texts["calibration"]
    monkeypatch.setattr(module, "demo_texts", texts.__getitem__)
    return module


def train(recipe, folder, *flags):
    threads = torch.get_num_threads()
    try:
        recipe.train(recipe.parse_args(["--output", str(folder), *SMALL, *flags]))
    finally:
        torch.set_num_threads(threads)


def test_an_interrupted_run_goes_on_to_the_same_model_which_can_be_pruned(recipe, tmp_path, monkeypatch):
    train(recipe, tmp_path / "whole")

    class Interrupts(recipe.BalanceExperts):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recipe, "BalanceExperts", Interrupts)
        train(recipe, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists() and (tmp_path / "resumed.run").is_dir()
    with pytest.raises(HeaprError, match="resume=True"):
        train(recipe, tmp_path / "resumed")
    with pytest.raises(HeaprError, match="seed=1.*has 0"):
        train(recipe, tmp_path / "resumed", "--resume", "--seed", "1")
    train(recipe, tmp_path / "resumed", "--resume")
    assert not (tmp_path / "resumed.run").exists()

    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    biases = [name for name in whole if name.endswith("e_score_correction_bias")]
    assert len(biases) == 4 and all(whole[name].abs().max() > 0 for name in biases)
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, msg=name)
    steps = [entry["step"] for entry in json.loads((tmp_path / "resumed" / "trained.json").read_text())["log"]]
    assert steps[0] == 1 and steps[-1] == 3

    config = HeaprConfig(
        dataset=str(tmp_path / "whole" / "calibration.jsonl"), num_samples=2, seq_length=64, eval_samples=0, ratio=0.5
    )
    pruner = HeaprPruner.from_pretrained(tmp_path / "resumed", config)
    pruner.prune()
    assert pruner.applied_plan.ratio == pytest.approx(0.5)
    assert set(map(len, pruner.applied_plan.widths.values())) == {64}
    with pytest.raises(HeaprError, match="not empty"):
        train(recipe, tmp_path / "whole")


def test_the_bias_of_an_expert_that_gets_more_than_its_share_goes_down(recipe):
    class Router(recipe.DeepseekV3TopkRouter):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.num_experts, self.e_score_correction_bias = 4, torch.nn.Buffer(torch.zeros(4))

        def forward(self, chosen):
            return None, None, chosen

    model = torch.nn.Sequential(Router())
    balance = recipe.BalanceExperts(model, rate=0.5)
    model(torch.tensor([[0, 1], [0, 2]]))
    model(torch.tensor([[0, 1], [0, 2]]))  # tokens 4, 2, 2, 0; 2 on average
    balance.on_step_end(None, None, None)
    assert model[0].e_score_correction_bias.tolist() == [-0.5, 0, 0, 0.5] and balance.busiest == 2
    model.eval()
    model(torch.tensor([[3, 3]]))
    assert not balance.counts


@pytest.mark.parametrize(
    "flags", [["--steps", "0"], ["--batch-size", "-1"], ["--learning-rate", "nan"], ["--learning-rate", "0"]]
)
def test_what_is_no_number_of_steps_or_no_rate_is_refused_by_name(recipe, flags, capsys):
    with pytest.raises(SystemExit):
        recipe.parse_args(["--output", "x", *flags])
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


def test_an_error_is_one_line(recipe, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("something")
    monkeypatch.setattr(sys, "argv", ["train.py", "--output", str(tmp_path / "taken")])
    with pytest.raises(SystemExit, match="^error: --output .*is a file"):
        recipe.main()
