# Licensed under the Apache License, Version 2.0
"""Tables of artefacts that were read without torch."""

import pytest
import torch

from optimum_heapr import AtomicStatistics, HeaprConfig, PruningPlan
from optimum_heapr.cli.lines import compensation_lines
from optimum_heapr.cli.tables import importance_table, plan_table, statistics_table
from optimum_heapr.criteria import importance
from optimum_heapr.report.content import build_report
from tests.helpers import random_statistics


@pytest.fixture
def statistics():
    return random_statistics(width=32, unreached={1: [2]})


def test_tables_are_the_same_of_arrays_and_of_tensors(statistics, tmp_path):
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=0.3))
    for artefact, tables in ((statistics, (statistics_table, importance_table)), (plan, (plan_table,))):
        artefact.save(tmp_path / "artefact")
        arrays = type(artefact).load(tmp_path / "artefact", "np")
        assert [table(arrays) for table in tables] == [table(artefact) for table in tables]
        assert arrays == type(artefact).load(tmp_path / "artefact", "np") != artefact


def test_importance_is_that_of_the_criterion_where_tokens_were(statistics):
    rows = [line.split() for line in importance_table(statistics).splitlines()[3:]]
    for row, (path, scores) in zip(rows, importance(statistics, "heapr").items(), strict=True):
        reached = scores[statistics.blocks[path].reached].double()
        assert row[0] == path and row[1::4] == [f"{reached.min():.3g}", f"{reached.max():.3g}"]


def test_damage_is_refused_by_either(statistics, tmp_path):
    next(iter(statistics.blocks.values())).fisher_sum[0, 0] = torch.nan
    statistics.save(tmp_path / "artefact")
    for framework in ("pt", "np"):
        with pytest.raises(ValueError, match="fisher_sum holds values that are not finite"):
            AtomicStatistics.load(tmp_path / "artefact", framework)


@pytest.mark.parametrize(
    ("width", "options", "keeps"),
    [
        (256, {}, ", and --align-for quantization keeps to 128"),
        (128, {}, ", and --width-multiple 64 keeps to 64"),  # 128 is a whole expert
        (96, {}, ", and --width-multiple 32 keeps to 32"),
        (64, {}, ", and --width-multiple 32 keeps to 32"),
        (64, {"width_multiple": 32}, "among so many"),  # nothing is left to ask for
        (256, {"align_for": "quantization"}, None),
        (96, {"width_multiple": 32}, None),
        (24, {}, None),  # nor were the unpruned experts
    ],
)
def test_widths_that_no_group_of_a_quantizer_fits_are_counted(width, options, keeps):
    plan = PruningPlan.build(random_statistics(width=width), HeaprConfig(ratio=0.5, **options))
    lines = [line for line in plan_table(plan).splitlines() if "quantizers share a scale" in line]
    assert len(lines) == (keeps is not None)
    if keeps:
        widths = [width for block in plan.widths.values() for width in block if width]
        fitting = sum(width % 32 == 0 for width in widths)
        assert lines[0].startswith(f"widths that are multiples of 32: {fitting} of {len(widths)}")
        assert lines[0].endswith(keeps)


def test_what_fits_did_for_whole_experts_that_went_is_said():
    """Experts that stay as wide as they were make up for those that went: nothing of a width says so."""
    options = {"layout": "uniform", "num_experts": 2, "ratio": 0.5, "compensate": True, "compensation_scope": "block"}
    statistics = random_statistics()
    routing = {"experts_per_token": 2, "groups": 1, "groups_per_token": 1, "parameters": 10, "bytes": 20}
    statistics.fingerprint["storage"]["routing"] = routing
    plan = PruningPlan.build(statistics, HeaprConfig(**options, reconstruction_steps=5))
    first, second = plan.kept
    plan.compensation = {first: [(0.5, 0.25)] * 4, second: [(0.3, 0.15)] * 4}
    plan.reconstruction = {
        first: {"removed": 0.5, "fitted": 0.4, "trained": 0.2, "share": 1.0, "kept": "trained"},
    }
    assert {width for block in plan.routed_widths.values() for width in block} == set(plan.original_width.values())
    lines = compensation_lines(plan)
    assert (
        "routed outputs of 2 layers 0.4000 -> 0.2000" in lines[0] and "0.5000 -> 0.4000 fitted -> 0.2000" in lines[1]
    )
    block = build_report(plan, "a/model")["blocks"][0]
    assert block["compensation"] == {"experts": 2, "changed": 2, "before": 0.5, "after": 0.25}
    plan.kept[second] = [torch.arange(8)] * 4  # a layer that lost nothing is none that was made up for
    plan.dropped = {}
    assert "routed outputs of 1 layers 0.5000 -> 0.2500" in compensation_lines(plan)[0]
