# Licensed under the Apache License, Version 2.0
"""Compensation over a block: against explicit least squares, through the pipeline, in every family."""

import copy

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.checkpoints.saving import apply_streaming, fit_checkpoint, write_streaming
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.families import TESTED
from optimum_heapr.surgery import block_compensation, least_squares
from optimum_heapr.surgery.block_compensation import fit_block
from optimum_heapr.surgery.block_inputs import BlockInputs, watched_blocks
from tests.helpers import calibration_data, random_ids, tiny_model, tiny_tokenizer
from tests.memory import LiveBytes
from tests.modeling.test_families import make_model


RATIO = 0.5
LENGTHS = (24,) * 20
OPTIONS = {"ratio": RATIO, "compensate": True, "compensation_scope": "block", "batch_size": 4}
SHARED = ("deepseek", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "qwen2_moe", "qwen3_next") + (
    "hunyuan_v1_moe",
)


def mixture(model, block):
    """The module that adds up routed and shared experts."""
    return model.get_submodule(block.path.rpartition(".")[0])


@torch.no_grad()
def mixture_calls(model, block, ids):
    """Inputs and outputs of a mixture, [tokens, d] each."""
    found = []

    def keep(module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        found.append((inputs[0].flatten(0, -2), output.flatten(0, -2)))

    hook = mixture(model, block).register_forward_hook(keep)
    model(input_ids=ids)
    hook.remove()
    return found[0]


def kept_evenly(block):
    """Every expert keeps another half."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randperm(block.width, generator=generator)[: block.width // 2].sort().values
        for _ in range(block.num_experts)
    ]


@torch.no_grad()
def explicit_fit(model, block, ids, kept, ridge):
    """The same problem, one token and one atomic expert after another, in one matrix; rows [w, d] by expert, then shared."""
    seen = []
    hook = block.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    shared_module = getattr(mixture(model, block), "shared_expert", None) or getattr(
        mixture(model, block), "shared_experts", None
    )
    model(input_ids=ids)
    hook.remove()
    hidden, index, weight = seen[0]
    tokens, width, experts = len(hidden), block.width, block.num_experts
    atoms = torch.zeros(tokens, experts * width, dtype=hidden.dtype)
    for token in range(tokens):
        for expert, share in zip(index[token].tolist(), weight[token]):
            gate, up = block.gate_up_rows(expert) @ hidden[token] + (block.gate_up_bias(expert) or 0.0)
            atoms[token, expert * width : (expert + 1) * width] = share * torch.nn.functional.silu(gate) * up
    shared = hidden.new_zeros(tokens, 0)
    if shared_module is not None:
        shared = shared_module.act_fn(shared_module.gate_proj(hidden)) * shared_module.up_proj(hidden)
        gate = getattr(mixture(model, block), "shared_expert_gate", None)
        if gate is not None:
            shared = torch.sigmoid(gate(hidden)) * shared
    stays = torch.zeros(experts * width, dtype=torch.bool)
    for expert, indices in enumerate(kept):
        stays[expert * width + indices] = True
    down = torch.cat([block.down_rows(expert) for expert in range(experts)])
    target = atoms[:, ~stays] @ down[~stays]
    design = torch.cat([atoms[:, stays], shared], dim=1)

    counts = torch.bincount(index.flatten(), minlength=experts)
    met = sum(int(count) * len(indices) for count, indices in zip(counts, kept)) / tokens
    penalties = []
    for expert, indices in enumerate(kept):
        own = atoms[:, expert * width : (expert + 1) * width]
        least = met / max(int(counts[expert]), 1) + shared.shape[1] / tokens
        penalties += [float(own.square().sum()) / width * max(ridge, least)] * len(indices)
    if shared.shape[1]:
        least = (met + shared.shape[1]) / tokens
        penalties += [float(shared.square().sum()) / shared.shape[1] * max(ridge, least)] * shared.shape[1]
    matrix = design.T @ design + torch.tensor(penalties, dtype=hidden.dtype).diag()
    change = torch.linalg.solve(matrix, design.T @ target)
    rows = (down[stays] + change[: int(stays.sum())]).split([len(indices) for indices in kept])
    return rows, change[int(stays.sum()) :]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v2", "qwen2_moe"])
def test_equals_explicit_least_squares(monkeypatch, model_type):
    monkeypatch.setattr(least_squares, "TOLERANCE", 1e-10)
    model = tiny_model(model_type, dtype=torch.float64)
    ids = random_ids(20, 16)
    block = find_expert_blocks(model)[-1]
    monkeypatch.setattr(least_squares, "NUMBERS_AT_ONCE", 100 * block.hidden_size)  # in four pieces
    kept = kept_evenly(block)
    with torch.no_grad(), watched_blocks(model, [block]) as watched:
        watched[block.path].counts = torch.ones(ids.numel(), dtype=torch.bool)
        model(input_ids=ids)
    fitted = fit_block(block, watched[block.path], kept, 0.01)
    rows, shared = explicit_fit(model, block, ids, kept, 0.01)
    for actual, expected in zip(fitted.rows, rows, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    assert len(fitted.shared) == (model_type != "qwen3_moe")
    for name, weight in fitted.shared.items():
        torch.testing.assert_close(weight, model.get_parameter(name) + shared.T, rtol=1e-6, atol=1e-9)
    assert 0 < fitted.error_after < fitted.error_before < 1


@torch.no_grad()
def test_nothing_removed_changes_nothing():
    model = tiny_model("deepseek_v2")
    block = find_expert_blocks(model)[0]
    with watched_blocks(model, [block]) as watched:
        watched[block.path].counts = torch.ones(32, dtype=torch.bool)
        model(input_ids=random_ids(2, 16))
    fitted = fit_block(block, watched[block.path], [torch.arange(block.width)] * block.num_experts, 0.01)
    assert fitted.shared == {} and (fitted.error_before, fitted.error_after) == (0, 0)
    for expert, rows in enumerate(fitted.rows):
        assert torch.equal(rows, block.down_rows(expert))


@torch.no_grad()
@pytest.mark.parametrize("row", ["gate", "up"])
def test_activations_that_are_not_finite_are_not_fitted_to(heapr_log, row):
    model = tiny_model("deepseek_v2")
    block = find_expert_blocks(model)[0]
    block.gate_up_rows(1)[("gate", "up").index(row), 3] = float("inf")
    kept = kept_evenly(block)
    with watched_blocks(model, [block]) as watched:
        watched[block.path].counts = torch.ones(64, dtype=torch.bool)
        model(input_ids=random_ids(4, 16))
    fitted = fit_block(block, watched[block.path], kept, 0.01)
    assert "not finite; it is cut without compensation" in heapr_log.text and fitted.shared == {}
    for expert, indices in enumerate(kept):
        assert torch.equal(fitted.rows[expert], block.down_rows(expert)[indices])


@pytest.mark.parametrize("model_type", TESTED)
def test_mixtures_come_closer_to_the_unpruned_ones(model_type):
    dense = make_model(model_type)
    data = calibration_data(*LENGTHS)
    data.samples = [sample % 90 + 3 for sample in data.samples]
    ids = torch.stack(data.samples)
    statistics = calibrate(dense, data, 4)
    errors = {}
    for compensate in (False, True):
        options = {**OPTIONS, "compensation_scope": "block"} if compensate else {"ratio": RATIO}
        pruner = HeaprPruner(copy.deepcopy(dense), config=HeaprConfig(**options))
        pruner.statistics, pruner.calibration_data = statistics, data
        pruner.apply(pruner.plan())
        errors[compensate] = []
        for block in find_expert_blocks(dense):
            inputs, expected = mixture_calls(dense, block, ids)
            with torch.no_grad():
                actual = mixture(pruner.model, block)(inputs.view(*ids.shape, -1))
            actual = (actual[0] if isinstance(actual, tuple) else actual).flatten(0, -2)
            errors[compensate].append(float((actual - expected).square().sum()))
    assert all(after < 0.97 * before for before, after in zip(errors[False], errors[True])), errors
    pairs = [pair for pairs in pruner.applied_plan.compensation.values() for pair in pairs]
    assert len(pairs) == sum(block.num_experts for block in find_expert_blocks(dense))
    assert all(after < before for before, after in pairs)
    # The down projections of shared experts are fitted, too, and nothing else is touched.
    after = pruner.model.state_dict()
    routed = {block.path for block in find_expert_blocks(dense)}
    changed = {
        name
        for name, weight in dense.state_dict().items()
        if not any(name.startswith(path) for path in routed) and not torch.equal(weight, after[name])
    }
    assert all("shared" in name and name.endswith("down_proj.weight") for name in changed)
    assert len(changed) == (len(routed) if model_type in SHARED else 0)


def test_what_stands_beside_the_experts_but_is_not_added_up_is_left_alone():
    model = tiny_model("deepseek_v2")
    block = find_expert_blocks(model)[0]
    forward = type(mixture(model, block)).forward

    def normed(self, hidden):
        return torch.nn.functional.normalize(forward(self, hidden), dim=-1)

    mixture(model, block).forward = normed.__get__(mixture(model, block))
    with torch.no_grad(), watched_blocks(model, [block]) as watched:
        watched[block.path].counts = torch.ones(32, dtype=torch.bool)
        model(input_ids=random_ids(2, 16))
    assert watched[block.path].shared == {}
    assert fit_block(block, watched[block.path], kept_evenly(block), 0.01).shared == {}


def test_padding_does_not_count_nor_do_micro_batches():
    model, data = tiny_model("qwen2_moe", dtype=torch.float64), calibration_data(30, 9, 22, 30, 5, 30, 17, 30)
    plans = {}
    for batch_size in (1, 3):
        pruner = HeaprPruner(copy.deepcopy(model), config=HeaprConfig(**{**OPTIONS, "batch_size": batch_size}))
        pruner.statistics, pruner.calibration_data = calibrate(model, data, 1), data
        plans[batch_size] = pruner.apply(pruner.plan())
    for name, weight in plans[1].state_dict().items():
        torch.testing.assert_close(plans[3].state_dict()[name], weight, rtol=1e-8, atol=1e-10)


def test_layers_that_accelerate_has_placed_keep_their_hooks():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, data, seen = tiny_model(), calibration_data(*LENGTHS), []

    class Hook(AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return super().pre_forward(module, *args, **kwargs)

    expected, placed = copy.deepcopy(model), copy.deepcopy(model)
    statistics = calibrate(model, data, 4)
    for layer in placed.model.layers:
        add_hook_to_module(layer, Hook(execution_device="cpu", io_same_device=True))
    for changed in (expected, placed):
        pruner = HeaprPruner(changed, config=HeaprConfig(**OPTIONS))
        pruner.statistics, pruner.calibration_data = statistics, data
        pruner.apply(pruner.plan())
    assert len(seen) == len(placed.model.layers) * len(data.samples) / 4
    ids = random_ids()
    assert torch.equal(placed(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert len(seen) == len(placed.model.layers) * (len(data.samples) / 4 + 1)


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [("deepseek", "variable"), ("deepseek", "uniform"), ("gpt_oss", "padded"), ("qwen2_moe", "variable")],
)
def test_cut_file_by_file(tmp_path, model_type, layout):
    model, data = tiny_model(model_type, moe_intermediate_size=16, intermediate_size=16), calibration_data(*LENGTHS)
    model.save_pretrained(tmp_path / "model")
    config = HeaprConfig(**OPTIONS, layout=layout)
    plan = PruningPlan.build(calibrate(model, data, 4), config)
    pruner = HeaprPruner(model)
    pruner.calibration_data = data
    pruner.apply(plan)
    pruner.save_pretrained(tmp_path / "expected")
    plan.compensation = {}
    (tmp_path / "out").mkdir()
    fitted = fit_checkpoint(tmp_path / "model", plan, tmp_path, data, activation_memory=0)
    write_streaming(tmp_path / "model", plan, tmp_path / "out", fitted=fitted)
    streamed, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert streamed.keys() == expected.keys()
    assert all(torch.equal(streamed[name], weight) for name, weight in expected.items())
    assert PruningPlan.load(tmp_path / "out").compensation == {
        path: [list(pair) for pair in pairs] for path, pairs in pruner.applied_plan.compensation.items()
    }


@pytest.fixture
def checkpoint(tmp_path):
    """A model and a tokenizer on disk, and text."""
    tiny_model("deepseek", vocab_size=tiny_tokenizer().vocab_size + 8).save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    lines = "\n".join(f"Experts that stay make up for those that go, line {number}." for number in range(200))
    (tmp_path / "text.txt").write_text(lines)
    return tmp_path


def test_the_text_that_the_plan_names_is_read_again(checkpoint):
    text = {"dataset": str(checkpoint / "text.txt"), "num_samples": 12, "seq_length": 32, "eval_samples": 0}
    config = HeaprConfig(**OPTIONS, **text)
    pruner = HeaprPruner.from_pretrained(checkpoint / "model", config)
    pruner.prune()
    pruner.save_pretrained(checkpoint / "pruned")
    pruner.applied_plan.save(checkpoint / "plan")  # that in the folder names the text without its place
    apply_streaming(checkpoint / "model", checkpoint / "plan", checkpoint / "again")
    assert (checkpoint / "again" / "model.safetensors").read_bytes() == (
        checkpoint / "pruned" / "model.safetensors"
    ).read_bytes()
    assert not list((checkpoint / "again").glob(".compensation*"))


def test_without_text_nothing_is_cut(checkpoint):
    model, data = tiny_model(), calibration_data(*LENGTHS)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plan = PruningPlan.build(calibrate(model, data, 4), HeaprConfig(**OPTIONS))
    with pytest.raises(HeaprError, match="dataset=None: name the text"):
        HeaprPruner(model).apply(plan)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


def test_a_fit_without_room_is_refused_before_anything_is_measured(monkeypatch):
    model = tiny_model()
    needed = block_compensation.fitting_bytes(find_expert_blocks(model)[0], 128 * 2048, 2)
    assert needed > 128 * 2048 * (4 * 2 * 32)  # what tokens take, in float32
    monkeypatch.setattr(block_compensation, "available_bytes", lambda device: needed - 1)
    with pytest.raises(
        HeaprError, match="compensation_scope='block': needs .* bytes on .* for 128 samples of 2048 tokens"
    ):
        HeaprPruner(model, config=HeaprConfig(**OPTIONS)).prune()
    HeaprPruner(model, config=HeaprConfig(**OPTIONS, seq_length=1024)).check()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fit_takes_what_is_stated_and_not_much_less(monkeypatch, dtype):
    """Fewer tokens, experts and rows than in the large model of the guide, in about its proportions."""
    tokens, shape = (
        2048,
        {"hidden_size": 128, "moe_intermediate_size": 48, "num_experts": 32, "num_experts_per_tok": 4},
    )
    monkeypatch.setattr(least_squares, "NUMBERS_AT_ONCE", tokens * 128 // 16)
    monkeypatch.setattr(least_squares, "UNKNOWNS_AT_ONCE", 32 * 48 * 128 // 3)
    monkeypatch.setattr(least_squares, "MOST_STEPS", 3)
    block = find_expert_blocks(tiny_model(**shape, dtype=dtype))[0]
    weight, index = torch.rand(tokens, 32).topk(4)
    inputs, kept = (
        BlockInputs({}),
        [torch.arange(47)] * 32,
    )  # all but one, as the width that is stated is the whole one
    hidden = (torch.randn(tokens, 16) @ torch.randn(16, 128)).to(dtype)
    inputs._routing = [(hidden, index, weight.to(dtype))]
    del hidden, index, weight
    weights = list(block.module.parameters())
    with LiveBytes([*weights, *inputs._routing[0]]) as watched:
        fitted = block_compensation.fit_block(block, inputs, kept, 0.01)
    taken = watched.most - sum(part.nbytes for part in weights)
    assert 0.8 < taken / block_compensation.fitting_bytes(block, tokens, 4) < 1
    assert fitted.error_after < fitted.error_before


def test_half_precision_widths_that_no_kernel_takes_and_training_mode():
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, data = tiny_model("qwen2_moe", dtype=dtype, moe_intermediate_size=11), calibration_data(*LENGTHS)
        model.config.attention_dropout = 0.5
        pruner = HeaprPruner(model.train(), config=HeaprConfig(**OPTIONS))
        pruner.statistics, pruner.calibration_data = calibrate(model, data, 4), data
        pruner.apply(pruner.plan())
        assert model.training and model.get_experts_implementation() != "heapr_calibration"
        errors[dtype] = [pairs[0] for pairs in pruner.applied_plan.compensation.values()]
    for exact, half in zip(*errors.values(), strict=True):
        assert half[1] < half[0] and half == pytest.approx(exact, rel=0.1)


def test_no_second_order_statistics_are_needed():
    config = HeaprConfig(**OPTIONS)
    assert not config.needs_grams and config.compensates_blocks and not config.compensates_experts
    model, data = tiny_model(), calibration_data(*LENGTHS)
    rows = Dataset.from_dict({"input_ids": [sample.tolist() for sample in data.samples]})
    pruner = HeaprPruner(model, config=config)
    assert not any(block.has_grams for block in pruner.calibrate(rows).blocks.values())
    pruner.prune()
    assert all(after < before for pairs in pruner.applied_plan.compensation.values() for before, after in pairs)
