# Licensed under the Apache License, Version 2.0
"""The largest cut within a budget of loss: how it is searched for, and on which text."""

import copy
import json
import math

import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner
from optimum_heapr.budget import MEASUREMENTS, largest_cut
from optimum_heapr.evaluation.losses import mean_with_error
from optimum_heapr.evaluation.perplexity import window_losses
from optimum_heapr.planning.plan import PruningPlan
from tests.helpers import SENTENCES, random_statistics, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def statistics():
    return random_statistics(blocks=2, experts=8, width=64)


class Curve:
    """A model whose loss rises by `cost(ratio)`."""

    def __init__(self, cost, error=0.0):
        self.cost, self.error, self.ratios = cost, error, []

    def __call__(self, plan):
        self.ratios.append(plan.ratio)
        return self.cost(plan.ratio), self.error


@pytest.mark.parametrize("budget", [0.003, 0.02, 0.3])
@pytest.mark.parametrize(
    "cost",
    [
        lambda ratio: 2 * ratio**4,
        lambda ratio: math.expm1(9 * ratio) / 3000,
        lambda ratio: ratio / 3 if ratio < 0.4 else 5.0,
        lambda ratio: -1e-5 if ratio < 0.6 else ratio,
    ],
    ids=["power", "exponential", "cliff", "noise"],
)
def test_the_most_goes_that_the_budget_allows(cost, budget, statistics):
    measure = Curve(cost)
    plan = largest_cut(statistics, HeaprConfig(max_loss_increase=budget), measure)
    assert len(measure.ratios) <= MEASUREMENTS and len(set(measure.ratios)) == len(measure.ratios)
    assert cost(plan.ratio) <= budget
    # Either the budget is used up to a twentieth, or a little more costs too much: at worst every other step halves.
    assert cost(plan.ratio) >= 0.95 * budget or cost(plan.ratio + 0.03) > budget
    assert [point["ratio"] for point in plan.search] == measure.ratios
    assert plan.config.max_loss_increase == budget


def test_the_standard_error_counts(statistics):
    plan = largest_cut(statistics, HeaprConfig(max_loss_increase=0.3), Curve(lambda ratio: ratio, error=0.01))
    assert 0.27 <= plan.ratio <= 0.29


def test_the_search_ends_where_its_ends_cannot_be_told_apart(statistics):
    """Each is 0.1 uncertain: what lies less than that below the budget is as good as any, and costs no more measurements."""
    fine, coarse = Curve(lambda ratio: ratio, error=0.001), Curve(lambda ratio: ratio, error=0.1)
    config = HeaprConfig(max_loss_increase=0.3)
    assert largest_cut(statistics, config, fine).ratio == pytest.approx(0.29, abs=0.01)
    assert 0.1 <= largest_cut(statistics, config, coarse).ratio <= 0.2
    assert len(coarse.ratios) < len(fine.ratios)


@pytest.mark.parametrize(
    ("options", "reached"),
    [
        ({"layout": "uniform"}, [1 - kept / 64 for kept in range(8, 64, 8)]),
        ({"layout": "uniform", "align_for": "none", "tensor_parallel": 4}, [0.5]),
        ({"min_width": 48, "layout": "padded"}, None),
        ({"width_multiple": 32, "protect": "model.layers.0.*"}, None),
    ],
)
def test_layouts_have_the_ratios_that_they_have(options, reached, statistics):
    """The widest that fits, found although most ratios between are rounded or refused."""
    budget = 0.52
    measure = Curve(lambda ratio: ratio)
    plan = largest_cut(statistics, HeaprConfig(max_loss_increase=budget, **options), measure)
    config = HeaprConfig(**options)
    if reached is None:
        reached = []
        for step in range(1, 100):
            try:
                reached.append(PruningPlan.build(statistics, config.replace(ratio=step / 100)).ratio)
            except HeaprError:
                continue
    assert plan.ratio == pytest.approx(max(ratio for ratio in reached if ratio <= budget), abs=0.05 * budget)
    assert len(measure.ratios) <= MEASUREMENTS


def test_refusals(statistics):
    with pytest.raises(HeaprError, match=r"max_loss_increase=1e-06: removing .* already costs .* allow more"):
        largest_cut(statistics, HeaprConfig(max_loss_increase=1e-6), Curve(lambda ratio: 1.0))
    with pytest.raises(HeaprError, match="matches no expert block"):
        largest_cut(statistics, HeaprConfig(max_loss_increase=0.1, protect="nothing"), Curve(lambda ratio: 1.0))
    with pytest.raises(HeaprError, match=r"is measured with the model, .* use HeaprPruner.plan\(\)"):
        PruningPlan.build(statistics, HeaprConfig(max_loss_increase=0.1))
    with pytest.raises(HeaprError, match="max_loss_increase=0.0: must be at least 1e-06"):
        HeaprConfig(max_loss_increase=0)
    with pytest.raises(HeaprError, match="eval_samples=1: must be at least 2"):
        HeaprConfig(max_loss_increase=0.1, eval_samples=1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rows = [[sentence] * 4 for sentence in SENTENCES]
    for name, count in (("calibration", 40), ("evaluation", 6)):
        lines = [json.dumps({"text": " ".join(row) + f" {number}"}) for number in range(count) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def config_of(texts, **options):
    """A quick calibration, on so little text that no error is small."""
    return HeaprConfig(
        dataset=str(texts / "calibration.jsonl"), num_samples=8, seq_length=24, eval_samples=6, **options
    )


def windows_measured(monkeypatch):
    """The windows of every measurement from here on."""
    from optimum_heapr import measuring
    from optimum_heapr.report import observation

    seen = {"search": set(), "report": set()}
    for name, module in (("search", measuring), ("report", observation)):

        def measured(model, windows, source="text", name=name, real=module.window_losses):
            seen[name] |= {tuple(window.tolist()) for window in windows}
            return real(model, windows, source)

        monkeypatch.setattr(module, "window_losses", measured)
    return seen


@pytest.mark.parametrize("options", [{}, {"criterion": "obs", "compensate": True}, {"layout": "uniform"}])
def test_what_is_pruned_is_within_the_budget(options, texts, monkeypatch):
    """Measured anew on the cut model; and neither search nor report sees text that the other, or calibration, has seen."""
    # Widths that are multiples of 8, as the layout wants.
    model = tiny_model(moe_intermediate_size=32)
    seen = windows_measured(monkeypatch)
    pruner = HeaprPruner(model, tiny_tokenizer(), config_of(texts, max_loss_increase=0.1, **options))
    before = copy.deepcopy(model)
    pruner.prune()
    assert len(seen["search"]) >= 3 and len(seen["report"]) >= 3
    calibrated = {tuple(sample.tolist()) for sample in pruner.calibration_data.samples}
    assert not (seen["search"] & seen["report"] or (seen["search"] | seen["report"]) & calibrated)
    windows = [torch.tensor(window) for window in seen["search"]]
    counts = [len(window) - 1 for window in windows]
    losses = [window_losses(each, windows) for each in (before, pruner.model)]
    increase, error = mean_with_error([after - first for first, after in zip(*losses)], counts)
    found = next(point for point in pruner.applied_plan.search if point["ratio"] == pruner.applied_plan.ratio)
    assert increase == pytest.approx(found["increase"], abs=1e-5)
    assert increase + error <= 0.1 + 1e-5


def test_the_search_is_on_text_behind_that_of_the_report(texts, monkeypatch):
    seen = windows_measured(monkeypatch)
    config = config_of(texts, max_loss_increase=0.05, eval_dataset=str(texts / "evaluation.jsonl"))
    pruner = HeaprPruner(tiny_model(), tiny_tokenizer(), config)
    pruner.prune()
    assert len(seen["report"]) == 6 and len(seen["search"]) == 6 and not seen["report"] & seen["search"]


def test_statistics_of_a_file_serve_with_the_text_named(texts):
    tokenizer, config = tiny_tokenizer(), config_of(texts)
    statistics = HeaprPruner(tiny_model(), tokenizer, config).calibrate()
    pruner = HeaprPruner(tiny_model(), tokenizer, HeaprConfig())
    with pytest.raises(HeaprError, match=r"max_loss_increase=0.05: no text was held out .* eval_dataset"):
        pruner.plan(statistics, max_loss_increase=0.05)
    pruner.config = config
    plan = pruner.plan(statistics, max_loss_increase=0.05)
    assert plan.search and plan.config.max_loss_increase == 0.05
    with pytest.raises(HeaprError, match="has no text beyond the 2000 windows of the report"):
        pruner.plan(
            statistics, max_loss_increase=0.05, eval_dataset=str(texts / "evaluation.jsonl"), eval_samples=2000
        )


def test_a_plan_keeps_what_was_measured(texts, tmp_path):
    pruner = HeaprPruner(tiny_model(), tiny_tokenizer(), config_of(texts, max_loss_increase=0.05))
    pruner.calibrate()
    plan = pruner.plan()
    plan.save(tmp_path / "plan.safetensors")
    assert PruningPlan.load(tmp_path / "plan.safetensors") == plan
    assert PruningPlan.load(tmp_path / "plan.safetensors").search == plan.search


@pytest.mark.parametrize("memory", ["streaming", "offload"])
def test_it_needs_the_model_in_memory(memory, texts, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    with pytest.raises(HeaprError, match=r"max_loss_increase=0.05: .* memory='plain'"):
        HeaprPruner.from_pretrained(tmp_path, config_of(texts, max_loss_increase=0.05), memory=memory)
    if memory == "streaming":
        pruner = HeaprPruner.from_pretrained(tmp_path, config_of(texts), memory=memory)
        statistics = pruner.calibrate()
        with pytest.raises(HeaprError, match=r"max_loss_increase=0.05: .* memory='plain'"):
            pruner.plan(statistics, max_loss_increase=0.05)
