# Licensed under the Apache License, Version 2.0
"""The plan as data: what it reports, that its file comes back, and which files and models it refuses."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_heapr.calibration.statistics import AtomicStatistics
from optimum_heapr.configuration import HeaprConfig
from optimum_heapr.criteria import importance
from optimum_heapr.planning.plan import PruningPlan
from optimum_heapr.utils.errors import HeaprError
from tests.helpers import random_statistics


FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


def build(statistics=None, **options):
    return PruningPlan.build(statistics or random_statistics(), HeaprConfig(**{"ratio": 0.25, **options}))


def as_lists(plan):
    return {path: [indices.tolist() for indices in experts] for path, experts in plan.kept.items()}


def test_the_plan_keeps_what_is_most_important():
    statistics = random_statistics()
    for criterion in ("heapr", "fisher", "magnitude", "activation", "random"):
        plan = build(statistics, criterion=criterion, ratio=0.5, seed=3)
        scores = importance(statistics, criterion, 3)
        kept, gone = [], []
        for path, experts in plan.kept.items():
            for expert, indices in enumerate(experts):
                mask = torch.zeros(8, dtype=torch.bool)
                mask[indices] = True
                kept.append(scores[path][expert][mask])
                gone.append(scores[path][expert][~mask])
        assert torch.cat(kept).min() > torch.cat(gone).max()
        assert len(torch.cat(gone)) == 32


def test_what_a_plan_reports():
    plan = build(random_statistics(unreached={1: [3]}), ratio=0.3)
    assert list(plan.kept) == [FIRST, SECOND] and plan.original_width == {FIRST: 8, SECOND: 8}
    assert plan.widths == {path: [len(indices) for indices in experts] for path, experts in plan.kept.items()}
    assert plan.total == 64 and plan.removed == round(0.3 * 64) == 64 - sum(map(sum, plan.widths.values()))
    assert plan.ratio == 19 / 64
    # 96 parameters an atomic expert, 10,000 in the model.
    assert plan.parameter_ratio == 19 * 96 / 10_000
    assert plan.unreached == {SECOND: [3]} and plan.widths[SECOND][3] == 0
    assert plan.config.ratio == 0.3 and plan.model["weights"] == "0123456789abcdef"


def test_the_estimated_loss_increase_follows_the_formula():
    """`1/2 sum over removed k of (n_e / N) mean(h_k^2) mean((dL/dh_k)^2)`, one atomic expert after another."""
    statistics = random_statistics(unreached={0: [1]})
    plan = build(statistics, ratio=0.5)
    for path, block in statistics.blocks.items():
        expected = 0.0
        for expert in range(4):
            n = block.token_count[expert].item()
            for atom in set(range(8)) - set(plan.kept[path][expert].tolist()):
                if n:
                    h2 = block.activation_sq_sum[expert, atom].item() / n
                    g2 = block.gradient_sq_sum[expert, atom].item() / n
                    expected += 0.5 * n / 100 * h2 * g2  # 100 calibration tokens
        assert expected > 0 and math.isclose(plan.loss_increase[path], expected, rel_tol=1e-6)
    assert plan.estimated_loss_increase == sum(plan.loss_increase.values())
    assert build(statistics, ratio=0.7).estimated_loss_increase > plan.estimated_loss_increase


def test_equal_inputs_give_equal_plans_and_equal_files(tmp_path):
    for index in range(2):
        build(random_statistics(), criterion="random", seed=1).save(tmp_path / f"{index}.safetensors")
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    assert as_lists(build(criterion="random", seed=1)) != as_lists(build(criterion="random", seed=2))


def test_a_plan_from_loaded_statistics_is_the_same(tmp_path):
    statistics = random_statistics()
    statistics.save(tmp_path / "statistics.safetensors")
    assert as_lists(build(AtomicStatistics.load(tmp_path / "statistics.safetensors"))) == as_lists(build(statistics))


def test_unreached_experts_go_first_unless_they_are_protected():
    statistics = random_statistics(unreached={0: [0], 1: [2]})
    assert build(statistics).widths == {FIRST: [0, 8, 8, 8], SECOND: [8, 8, 0, 8]}  # 16 of 64 are exactly these
    plan = build(statistics, protect_unreached=True)
    assert plan.widths[FIRST][0] == plan.widths[SECOND][2] == 8 and plan.removed == 16
    plan = build(statistics, min_width=2)
    assert plan.widths[FIRST][0] == plan.widths[SECOND][2] == 2
    largest = statistics.blocks[FIRST].weight_norm[0].topk(2).indices.sort().values
    assert torch.equal(plan.kept[FIRST][0], largest), "among themselves they rank by weight norm"


# The file


@pytest.mark.parametrize("options", [{}, {"ratio": 0.9}, {"allocation": "uniform"}, {"width_multiple": 4}])
def test_what_is_saved_comes_back(tmp_path, options):
    plan = build(random_statistics(blocks=11, unreached={1: [2]}), **options)
    plan.save(tmp_path / "plan.safetensors")
    loaded = PruningPlan.load(tmp_path / "plan.safetensors")
    assert list(loaded.kept) == list(plan.kept)
    for path, experts in plan.kept.items():
        for expected, actual in zip(experts, loaded.kept[path], strict=True):
            assert torch.equal(expected, actual) and actual.dtype == torch.int64
    for name in ("original_width", "config", "model", "loss_increase", "unreached", "widths", "ratio"):
        assert getattr(loaded, name) == getattr(plan, name)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "plan.safetensors"
    build(ratio=0.5).save(path)
    return path


def rewrite(path, change):
    """Writes the file anew after `change(tensors, document)`, as a damaged or malicious writer would."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, document = load_file(path), json.loads(metadata["document"])
    change(tensors, document)
    save_file(tensors, path, {**metadata, "document": json.dumps(document)})


def test_missing_truncated_and_foreign_files_are_refused(saved):
    content = saved.read_bytes()
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:size])
        with pytest.raises(HeaprError, match=r"plan='.*plan\.safetensors': truncated or not a safetensors file"):
            PruningPlan.load(saved)
    random_statistics().save(saved)
    with pytest.raises(HeaprError, match="holds 'heapr_statistics' data, not 'heapr_plan'; name the right file"):
        PruningPlan.load(saved)
    with pytest.raises(HeaprError, match=r"plan='.*nothing': no such file; name a file"):
        PruningPlan.load(saved.parent / "nothing")


TORN = {
    "indices missing": lambda tensors, document: tensors.pop(f"{FIRST}.kept_indices"),
    "widths missing": lambda tensors, document: tensors.pop(f"{FIRST}.widths"),
    "an index too few": lambda tensors, document: tensors.update(
        {f"{FIRST}.kept_indices": tensors[f"{FIRST}.kept_indices"][1:].clone()}
    ),
    "an index too many": lambda tensors, document: tensors.update(
        {f"{FIRST}.kept_indices": torch.cat([tensors[f"{FIRST}.kept_indices"], torch.zeros(1, dtype=torch.int32)])}
    ),
    "a negative width": lambda tensors, document: tensors.update(
        {f"{FIRST}.widths": tensors[f"{FIRST}.widths"] - torch.tensor([9, -9, 0, 0], dtype=torch.int32)}
    ),
    "widths that are no integers": lambda tensors, document: tensors.update(
        {f"{FIRST}.widths": tensors[f"{FIRST}.widths"].float() + 0.5}
    ),
    "widths of another shape": lambda tensors, document: tensors.update(
        {f"{FIRST}.widths": tensors[f"{FIRST}.widths"].view(2, 2).clone()}
    ),
    "no original width": lambda tensors, document: document.update(original_width={}),
    "no config": lambda tensors, document: document.pop("config"),
    "an unknown option": lambda tensors, document: document["config"].update(colour="blue"),
    "no blocks": lambda tensors, document: document.pop("blocks"),
    "blocks that are a number": lambda tensors, document: document.update(blocks=3),
    "an unknown block": lambda tensors, document: document["blocks"].append("model.layers.7.mlp.experts"),
    "no model": lambda tensors, document: document.pop("model"),
}


@pytest.mark.parametrize("change", TORN.values(), ids=TORN)
def test_a_torn_plan_is_refused(saved, change):
    rewrite(saved, change)
    with pytest.raises(HeaprError) as error:
        PruningPlan.load(saved)
    assert "\n" not in str(error.value)


WRONG_INDICES = {"too large": [0, 8], "negative": [-1, 3], "twice": [2, 2], "falling": [3, 1]}


@pytest.mark.parametrize("indices", WRONG_INDICES.values(), ids=WRONG_INDICES)
def test_indices_out_of_range_or_order_are_refused(saved, indices):
    def change(tensors, document):
        tensors[f"{SECOND}.widths"] = torch.tensor([8, 2, 0, 0], dtype=torch.int32)
        tensors[f"{SECOND}.kept_indices"] = torch.tensor([*range(8), *indices], dtype=torch.int32)

    rewrite(saved, change)
    expected = r"indices of expert 1 of model\.layers\.1\.mlp\.experts must rise within \[0, 8\); plan again"
    with pytest.raises(HeaprError, match=expected):
        PruningPlan.load(saved)


def test_expert_blocks_of_another_shape_are_refused():
    plan = build()
    plan.check_shapes({FIRST: (4, 8), SECOND: (4, 8)})
    for shapes, planned, found in (
        ({FIRST: (4, 9), SECOND: (4, 8)}, r"\(4, 8\)", r"\(4, 9\)"),
        ({FIRST: (5, 8), SECOND: (4, 8)}, r"\(4, 8\)", r"\(5, 8\)"),
        ({FIRST: (4, 8)}, r"\(4, 8\)", "None"),
        ({FIRST: (4, 8), SECOND: (4, 8), "model.layers.2.mlp.experts": (4, 8)}, "None", r"\(4, 8\)"),
    ):
        message = (
            rf"has \(experts, width\) {planned} in the plan and {found} in the model; plan from statistics of this"
        )
        with pytest.raises(HeaprError, match=message):
            plan.check_shapes(shapes)
