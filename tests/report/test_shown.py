# Licensed under the Apache License, Version 2.0
"""What a pruner and its report print, before and after."""

from xml.etree import ElementTree

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.recovery.report import RecoveryReport
from tests.helpers import tiny_model
from tests.report.reports import measured_pruner


def lines(shown) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in repr(shown).splitlines()[1:])


def test_a_pruner_says_what_it_holds_at_each_stage():
    model = tiny_model()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pruner = HeaprPruner(model, config=HeaprConfig(ratio=0.4, criterion="obs"))
    assert lines(pruner) == {
        "  model": f"Qwen3MoeForCausalLM, {parameters:,} parameters",
        "  config": "HeaprConfig(ratio=0.4, criterion='obs')",
        "  calibrated": "no",
        "  pruned": "no",
    }
    done = measured_pruner()
    found, losses = lines(done), done.report["loss"]["measured"]
    assert found["  calibrated"].endswith(f"second order, removal curves, on {6 * 24} tokens")
    assert f"{done.applied_plan.removed} of 144 atomic experts" in found["  pruned"]
    assert found["  loss"].startswith(f"{losses['before']['loss']:.4f} -> {losses['after']['loss']:.4f} nats")
    shown = ElementTree.fromstring(done._repr_html_())
    assert shown[0].text == "HeaprPruner" and shown[-1][0].text == "loss"


def test_what_broke_off_is_said():
    pruner = HeaprPruner(tiny_model())
    pruner.model._heapr_broken_off = "was cut in part"
    assert lines(pruner)["  pruned"] == "was cut in part"


def test_a_report_prints_as_its_comparison():
    report = measured_pruner().report
    text = repr(report).splitlines()
    assert text[0].endswith("of its routed atomic experts") and len(text) < 15
    removed = report["removed"]
    assert text[1].startswith(f"  routed atomic experts: {removed['before']} -> {removed['after']}  \N{MINUS SIGN}40.")
    shown = ElementTree.fromstring(report._repr_html_())
    assert [cell.text for cell in shown[2]][:3] == [
        "routed atomic experts",
        str(removed["before"]),
        str(removed["after"]),
    ]


def test_a_recovery_report_prints_its_stages():
    known = {"history": [], "trained_parameters": 8, "seconds": 1.0, "data": {}, "config": {}, "model": {}}
    stages = {"unpruned": 2.0, "pruned": 2.5, "recovered": 2.25}
    report = RecoveryReport(stages, improved=True, best_step=3, steps=4, **known)
    assert report.in_words().startswith("unpruned: 2.0000 (+0.0000), pruned: 2.5000 (+0.5000), recovered: 2.2500")
    assert report.in_words().endswith("kept: step 3 of 4") and len(repr(report)) < 150
