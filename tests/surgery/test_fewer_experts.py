# Licensed under the Apache License, Version 2.0
"""Experts that go from the router: against a smaller model made by hand, loaded where this package cannot be imported, fitted."""

import copy
import functools

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.planning.size import planned_sizes
from optimum_heapr.surgery import least_squares
from optimum_heapr.surgery.apply import apply_plan
from optimum_heapr.surgery.masking import masked
from optimum_heapr.text.samples import CalibrationData
from tests.helpers import calibration_data, tiny_model
from tests.processes import run_python

from .stock_models import logits_of, token_ids, wide_model
from .test_stock import LOAD_ELSEWHERE


# Shared experts; rows alone; groups and correction biases; biases of routers and experts.
FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss")
EXPERTS, WIDTH = 4, 24  # of 6 experts of 32


@functools.cache
def measured(family: str):
    """A model and what was measured on it; tests that change the model take a copy."""
    model = wide_model(family)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(3)))
    generator = torch.Generator().manual_seed(2)
    data = CalibrationData(list(torch.randint(3, 96, (24, 24), generator=generator)), "random", 0, 24)
    return model, data, calibrate(model, data, batch_size=8)


def plan_of(family: str, **options) -> PruningPlan:
    return PruningPlan.build(measured(family)[2], config_of(**options))


def config_of(**options) -> HeaprConfig:
    return HeaprConfig(**{"ratio": 0.5, "layout": "uniform", "num_experts": EXPERTS, "seq_length": 24, **options})


def applied(family: str, plan: PruningPlan) -> torch.nn.Module:
    model, data, statistics = measured(family)
    return apply_plan(copy.deepcopy(model), plan, statistics, data)


def by_hand(model: torch.nn.Module, plan: PruningPlan) -> torch.nn.Module:
    """A model of the family with fewer experts, made from its configuration, with tensors picked by their names."""
    config = copy.deepcopy(model.config)
    name = next(n for n in ("num_local_experts", "n_routed_experts", "num_experts") if n in vars(config))
    assert getattr(config, name) == 6
    setattr(config, name, EXPERTS)
    smaller = type(model)(config).eval()
    blocks = {block.path: block for block in find_expert_blocks(model)}
    state = {}
    for key, tensor in model.state_dict().items():
        block = next((path for path in blocks if key.startswith(path.rpartition(".")[0] + ".")), None)
        if block and key.rpartition(".")[0].endswith((".gate", ".router", ".experts")):
            stays = [expert for expert in range(6) if expert not in plan.dropped[block]]
            assert len(stays) == EXPERTS and len(tensor) == 6
            tensor = tensor[stays]
        state[key] = tensor.clone()
    smaller.load_state_dict(state)
    with torch.no_grad():
        for block in find_expert_blocks(smaller):
            stays = [expert for expert in range(6) if expert not in plan.dropped[block.path]]
            for place, expert in enumerate(stays):
                removed = torch.ones(32, dtype=torch.bool)
                removed[plan.kept[block.path][expert]] = False
                block.down_rows(place)[removed] = 0.0
    return smaller


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every family, cut in memory and file by file, and loaded in another process."""
    folder = tmp_path_factory.mktemp("fewer")
    plans = {}
    for family in FAMILIES:
        model, data, _ = measured(family)
        model.save_pretrained(folder / f"{family}-source", max_shard_size="60KB")
        plans[family] = plan_of(family)
        for memory in ("plain", "streaming"):
            pruner = HeaprPruner.from_pretrained(folder / f"{family}-source", memory=memory)
            pruner.apply(plans[family])
            pruner.save_pretrained(folder / f"{family}-{memory}", max_shard_size="50KB")
    save_file({"ids": token_ids()}, folder / "ids.safetensors")
    done = run_python(LOAD_ELSEWHERE, folder, *(f"{family}-streaming" for family in FAMILIES), has="libraries")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, plans, load_file(folder / "logits.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_is_the_smaller_model_made_by_hand(self, family):
        model, plan = measured(family)[0], plan_of(family)
        assert all(widths == [WIDTH] * EXPERTS for widths in plan.routed_widths.values())
        expected, pruned = logits_of(by_hand(model, plan)), applied(family, plan)
        torch.testing.assert_close(logits_of(pruned), expected, atol=1e-5, rtol=1e-5)
        assert (expected - logits_of(model)).abs().max() > 1e-2
        assert {block.num_experts for block in find_expert_blocks(pruned)} == {EXPERTS}

    def test_files_are_those_of_cutting_in_memory_and_load_elsewhere(self, saved, family):
        folder, plans, logits = saved
        files = {
            memory: {path.name: path.read_bytes() for path in (folder / f"{family}-{memory}").glob("*.*")}
            for memory in ("plain", "streaming")
        }
        assert len([name for name in files["plain"] if name.endswith(".safetensors")]) > 3
        assert files["streaming"] == files["plain"]
        expected = logits_of(by_hand(measured(family)[0], plans[family]))
        torch.testing.assert_close(logits[f"{family}-streaming"], expected, atol=1e-5, rtol=1e-5)

    def test_masking_is_cutting_and_leaves_the_model_as_it_was(self, family):
        model, plan = copy.deepcopy(measured(family)[0]), plan_of(family)
        before = logits_of(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config = model.config.to_dict()
        with masked(model, plan):
            inside = logits_of(model)
        torch.testing.assert_close(inside, logits_of(applied(family, plan)), atol=1e-5, rtol=1e-5)
        assert torch.equal(logits_of(model), before) and model.config.to_dict() == config
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    def test_a_fit_under_the_new_routing_comes_closer_to_the_unpruned_layers(self, family):
        model, data, _ = measured(family)
        fitted = plan_of(family, compensate=True, compensation_scope="block", batch_size=8)
        errors = {}
        for plan in (plan_of(family), fitted):
            errors[plan.config.compensate] = layer_errors(model, applied(family, plan), data)
        assert all(after < 0.9 * before for before, after in zip(errors[False], errors[True], strict=True))
        if family in ("qwen3_moe", "mixtral"):  # nothing but routed experts: the whole error is that of their output
            reported = [experts[0] for experts in fitted.compensation.values()]
            torch.testing.assert_close([before for before, _ in reported], errors[False], rtol=1e-3, atol=0)
            torch.testing.assert_close([after for _, after in reported], errors[True], rtol=1e-3, atol=0)


@torch.no_grad()
def layer_errors(model, other, data) -> list[float]:
    """Relative squared error of what routed and shared experts add up to, given the inputs of the unpruned model."""
    errors = []
    for path in (block.path.rpartition(".")[0] for block in find_expert_blocks(model)):
        calls = []
        module = model.get_submodule(path)
        handle = module.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
        for sample in data.samples:
            model(input_ids=sample[None])
        handle.remove()
        lost = total = 0.0
        for inputs, output in calls:
            outputs = output, other.get_submodule(path)(*inputs)
            first, second = (part[0] if isinstance(part, tuple) else part for part in outputs)
            lost, total = lost + (second - first).square().sum(), total + first.square().sum()
        errors.append(float(lost / total))
    return errors


def test_the_fit_equals_explicit_least_squares_under_the_new_routing(monkeypatch):
    monkeypatch.setattr(least_squares, "TOLERANCE", 1e-10)
    monkeypatch.setattr(least_squares, "MOST_STEPS", 500)
    model, data = tiny_model("qwen3_moe", dtype=torch.float64), calibration_data(*(24,) * 30)
    statistics = calibrate(model, data, batch_size=10)
    options = {"compensate": True, "compensation_scope": "block", "width_multiple": 1, "batch_size": 10}
    plan = PruningPlan.build(statistics, config_of(num_experts=4, ratio=0.5, **options))
    block = find_expert_blocks(model)[-1]
    path, router = block.path, model.get_submodule(block.path.rpartition(".")[0]).gate
    calls = []
    handle = block.module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    with torch.no_grad():
        for sample in data.samples:
            model(input_ids=sample[None])
    handle.remove()
    hidden, index, weight = (torch.cat(parts) for parts in zip(*calls))
    atoms = torch.stack([atomic_outputs(block, expert, hidden) for expert in range(6)], 1)  # [tokens, 6, I]
    down = torch.stack([block.down_rows(expert) for expert in range(6)])
    old = torch.zeros(len(hidden), 6, dtype=hidden.dtype).scatter_(1, index, weight)
    target = torch.einsum("te,tei,eid->td", old, atoms, down)

    logits = hidden @ router.weight.T
    logits[:, plan.dropped[path]] = -torch.inf
    value, chosen = logits.softmax(-1, dtype=torch.float32).topk(2, dim=-1)  # as the family does
    value = value / value.sum(-1, keepdim=True) if model.config.norm_topk_prob else value
    new = torch.zeros_like(old).scatter_(1, chosen, value.to(old.dtype))
    design, first, penalties = [], [], []
    counts = (new > 0).sum(0)
    met = sum(int(counts[expert]) * len(kept) for expert, kept in enumerate(plan.kept[path])) / len(hidden)
    for expert, kept in enumerate(plan.kept[path]):
        own = new[:, expert, None] * atoms[:, expert]
        design.append(own[:, kept])
        first.append(down[expert][kept])
        ridge = max(0.01, met / max(int(counts[expert]), 1))
        penalties += [float(own.detach().square().sum()) / block.width * ridge] * len(kept)
    design, first = torch.cat(design, 1), torch.cat(first)
    matrix = design.T @ design + torch.tensor(penalties, dtype=design.dtype).diag()
    expected = first + torch.linalg.solve(matrix, design.T @ (target - design @ first))

    apply_plan(model, plan, data=data)
    pruned = find_expert_blocks(model)[-1]
    assert pruned.num_experts == 4 and len(expected) == 4 * pruned.width
    actual = torch.cat([pruned.down_rows(expert) for expert in range(4)])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


def atomic_outputs(block, expert, hidden):
    gate, up = block.gate_up_rows(expert) @ hidden.T
    return (torch.nn.functional.silu(gate) * up).T


@pytest.mark.parametrize("scope", ["expert", "block"])
def test_streaming_fits_the_same(scope, tmp_path):
    model, data, _ = measured("deepseek_v3")
    model.save_pretrained(tmp_path / "source")
    statistics = calibrate(copy.deepcopy(model), data, batch_size=8, gram=True)
    plan = PruningPlan.build(statistics, config_of(compensate=True, compensation_scope=scope, batch_size=8))
    for memory in ("plain", "streaming"):
        pruner = HeaprPruner.from_pretrained(tmp_path / "source", memory=memory)
        pruner.calibration_data = data
        pruner.apply(plan, statistics)
        pruner.save_pretrained(tmp_path / memory)
    first, second = (load_file(tmp_path / memory / "model.safetensors") for memory in ("plain", "streaming"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)


def test_sizes_are_those_of_the_pruned_model():
    for family in FAMILIES:
        model, plan = measured(family)[0], plan_of(family)
        before, after = planned_sizes(plan)
        pruned = applied(family, plan)
        padding = sum(p.numel() for n, p in pruned.named_parameters() if "shared_experts" in n)
        padding -= sum(p.numel() for n, p in model.named_parameters() if "shared_experts" in n)
        count = sum(parameter.numel() for parameter in pruned.parameters()) - padding
        assert (after.parameters, after.num_bytes) == (count, 4 * count)
        assert plan.parameter_ratio == pytest.approx(1 - count / before.parameters)


def test_a_size_counts_experts_that_went_and_their_rows():
    model = measured("gpt_oss")[0]
    unpruned = sum(parameter.numel() for parameter in model.parameters())
    target = planned_sizes(plan_of("gpt_oss"))[1].parameters  # where the width is a multiple of 8
    for options in ({"target_parameters": target}, {"target_size": 4 * target}):
        plan = plan_of("gpt_oss", ratio=None, **options)
        assert planned_sizes(plan)[1].parameters == target < unpruned and plan.ratio == 0.5


def test_refused_before_anything_is_changed(monkeypatch):
    monkeypatch.setattr(HeaprPruner, "calibrate", lambda *_: pytest.fail("was calibrated"))
    cases = [
        (
            "qwen3_moe",
            {"num_experts": 1},
            "num_experts=1: must lie between 2, which a token gets, and 6, which a layer has",
        ),
        ("qwen3_moe", {"num_experts": 7}, "num_experts=7: must lie between 2"),
        ("deepseek_v3", {"num_experts": 3}, "ranks 2 groups of experts, .* use a multiple of 2 from 4 to 6"),
        (
            "qwen3_moe",
            {"num_experts": 2},
            "num_experts=2: ratio=0.5 leaves 48 atomic experts for each, and they have 32; keep at",
        ),
        ("hunyuan_v1_moe", {}, "sizes model.layers.0.mlp.shared_mlp"),
    ]
    for family, options, message in cases:
        with pytest.raises(HeaprError, match=message):
            HeaprPruner(wide_model(family), config=config_of(**options)).prune()


def test_routers_whose_number_of_experts_cannot_change_are_refused_by_name():
    model, other = wide_model("qwen3_moe"), wide_model("qwen3_moe", num_experts=5)
    model.model.layers[1].mlp = other.model.layers[1].mlp
    with pytest.raises(
        HeaprError, match=r"no single field of Qwen3MoeConfig sets the number of experts of all layers \(5, 6\)"
    ):
        HeaprPruner(model).check(config_of())
    model = wide_model("qwen3_moe")
    model.model.layers[0].mlp.gate.register_buffer("table", torch.zeros(96, 2, dtype=torch.int64))
    with pytest.raises(HeaprError, match=r"model\.layers\.0\.mlp\.gate\.table names experts by their numbers"):
        HeaprPruner(model).check(config_of())


def test_whole_experts_alone_may_go():
    plan = plan_of("mixtral", num_experts=3)
    assert all(widths == [32] * 3 for widths in plan.routed_widths.values()) and plan.ratio == 0.5
    assert applied("mixtral", plan).config.num_local_experts == 3


def test_statistics_of_an_earlier_version_are_refused():
    statistics = copy.deepcopy(measured("mixtral")[2])
    del statistics.fingerprint["storage"]["routing"]
    with pytest.raises(
        HeaprError, match="num_experts=4: the statistics do not say what routers the model has; calibrate"
    ):
        PruningPlan.build(statistics, config_of())


def test_report_and_card_say_what_went(saved):
    folder, plans, _ = saved
    card = (folder / "deepseek_v3-plain" / "README.md").read_text()
    assert "| block | experts | in the router | width before |" in card
    assert "| `model.layers.1.mlp.experts` | 6 | 4 | 32 | 50.0% | 24 | 24 | 0 | 0 |" in card
    assert "2 of the 6 routed experts of each layer went from its router" in card
    page = (folder / "deepseek_v3-plain" / "heapr" / "report.md").read_text()
    assert (
        "in the router" in page
        and PruningPlan.load(folder / "deepseek_v3-plain").dropped == plans["deepseek_v3"].dropped
    )
