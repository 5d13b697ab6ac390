# Licensed under the Apache License, Version 2.0
"""Training of what stays of a block: against the outputs of whole models, in every layout, file by file."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.checkpoints.saving import fit_checkpoint, write_streaming
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.report.content import build_report
from optimum_heapr.report.markdown import report_markdown
from optimum_heapr.surgery import block_compensation, layer_by_layer, reconstruction
from optimum_heapr.surgery.masking import masked
from optimum_heapr.surgery.portion import Portion
from tests.helpers import calibration_data, tiny_model
from tests.surgery.test_block_compensation import mixture


LENGTHS = (24,) * 320
COMPENSATED = {"ratio": 0.5, "compensate": True, "compensation_scope": "block", "batch_size": 40}
OPTIONS = {**COMPENSATED, "reconstruction_steps": 60}
FEW = {**OPTIONS, "reconstruction_steps": 12}


@pytest.fixture(scope="module")
def measured():
    """By model type, an unpruned model, text, and its statistics. Not to be changed."""
    found = {}

    def of(model_type):
        if model_type not in found:
            model, data = tiny_model(model_type), calibration_data(*LENGTHS)
            found[model_type] = model, data, calibrate(model, data, 40)
        return found[model_type]

    return of


def pruned_by(measured, options, data=None):
    """The pruned model and its plan."""
    model, text, statistics = measured
    pruner = HeaprPruner(copy.deepcopy(model), config=HeaprConfig(**options))
    pruner.statistics, pruner.calibration_data = statistics, data or text
    return pruner.apply(pruner.plan()), pruner.applied_plan


@torch.no_grad()
def mixture_outputs(model, paths, ids):
    """What the mixtures of a whole model give, [tokens, d] by path of the block."""
    found, hooks = {}, []
    for path in paths:

        def keep(module, inputs, output, path=path):
            found[path] = (output[0] if isinstance(output, tuple) else output).flatten(0, -2)

        hooks.append(model.get_submodule(path.rpartition(".")[0]).register_forward_hook(keep))
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return found


def held_out(tokens):
    """The tokens that decide: of the text in 64 parts, the last of every eight."""
    return [token for token in range(tokens) if token // (tokens // 64) % 8 == 7]


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [("qwen3_moe", "variable"), ("qwen2_moe", "variable"), ("deepseek_v2", "variable"), ("gpt_oss", "uniform")],
)
def test_outputs_of_the_whole_model_come_closer_on_held_out_tokens(measured, model_type, layout):
    dense, data, _ = measured(model_type)
    options = {"layout": layout, "width_multiple": 4, "num_experts": 5} if layout == "uniform" else {}
    pruned, plan = pruned_by(measured(model_type), {**OPTIONS, **options})
    fitted, _ = pruned_by(measured(model_type), {**COMPENSATED, **options})
    ids, paths = torch.stack(data.samples), list(plan.kept)
    chosen = held_out(ids.numel())
    target, trained, compensated = (mixture_outputs(model, paths, ids) for model in (dense, pruned, fitted))

    def error(outputs, path):
        wanted = target[path][chosen]
        return float((outputs[path][chosen] - wanted).square().sum() / wanted.square().sum())

    assert set(plan.reconstruction) == set(paths)
    for path, done in plan.reconstruction.items():
        assert done["kept"] == "trained" and done["trained"] < done["fitted"] < done["removed"]
        # The plan says what a forward of the whole pruned model gives, as long as all below is as it was trained.
        assert error(trained, path) == pytest.approx(done["trained"], rel=1e-3)
        assert error(trained, path) < error(compensated, path)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_blocks_are_trained_on_what_comes_in_in_both_models(measured, model_type, monkeypatch):
    """Of the unpruned model too, in which all below is as it was; routed to the experts that stay in either."""
    seen, trained = {}, layer_by_layer.reconstruct_block

    def kept(block, *arguments):
        seen[block.path] = arguments[2], arguments[4]
        return trained(block, *arguments)

    monkeypatch.setattr(layer_by_layer, "reconstruct_block", kept)
    dense, data, _ = measured(model_type)
    options = {"layout": "uniform", "width_multiple": 4, "num_experts": 5}
    pruned, plan = pruned_by(measured(model_type), {**FEW, **options})
    ids, target = torch.stack(data.samples), mixture_outputs(dense, plan.kept, torch.stack(data.samples))
    for number, model in enumerate((dense, pruned)):
        mixtures = {path: model.get_submodule(path.rpartition(".")[0]) for path in plan.kept}
        inputs = {}
        hooks = [
            module.register_forward_pre_hook(
                lambda _, given, path=path: inputs.update({path: given[0].flatten(0, -2)})
            )
            for path, module in mixtures.items()
        ]
        with torch.no_grad():
            model(input_ids=ids)
        for hook in hooks:
            hook.remove()
        for path in plan.kept:
            calls = seen[path][0][number]
            torch.testing.assert_close(calls.hidden, inputs[path], rtol=1e-4, atol=1e-4)
            assert set(calls.index.unique().tolist()) == set(plan.routed[path])
            assert set(calls.shared) == (
                {f"{path.rpartition('.')[0]}.shared_expert"} if model_type == "qwen2_moe" else set()
            )
            for given, scale in calls.shared.values():
                assert torch.equal(given, calls.hidden) and scale.shape == (len(given), 1)
    for path, (_, given) in seen.items():
        torch.testing.assert_close(given, target[path], rtol=1e-4, atol=1e-4)
    last = list(plan.kept)[-1]
    both = seen[last][0]
    assert not torch.allclose(both[0].hidden, both[1].hidden, atol=1e-3)


def test_half_of_each_step_is_of_either_model():
    class Student:
        portion, weight = Portion(calibration_data(5000), 1), torch.ones(1, requires_grad=True)
        parameters = {"weight": weight}

        def output(self, *tokens):
            steps.append(tokens)
            return torch.cat(tokens)[:, None] * self.weight

    steps = []
    config = HeaprConfig(**{**OPTIONS, "reconstruction_steps": 3})
    reconstruction.train(Student(), torch.zeros(5000, 1) + 1, torch.arange(5000), config)
    for unpruned, pruned in steps:
        assert len(unpruned) == len(pruned) == 1024 and not set(unpruned.tolist()) & set(pruned.tolist())
    assert len(steps) == 3


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_all_that_stays_of_a_block_is_trained_and_nothing_else(measured, model_type):
    dense, _, _ = measured(model_type)
    pruned, plan = pruned_by(measured(model_type), {**FEW, "layout": "padded"})
    before, after = dense.state_dict(), pruned.state_dict()
    inside = tuple(f"{mixture_path}." for mixture_path in {path.rpartition(".")[0] for path in plan.kept})
    for name, weight in before.items():
        if name.startswith(inside) and "gate.weight" not in name and "router" not in name:
            continue
        assert torch.equal(weight, after[name]), name
    for block in find_expert_blocks(dense):
        cut = next(found for found in find_expert_blocks(pruned) if found.path == block.path)
        for expert, kept in enumerate(plan.kept[block.path]):
            for rows in ("gate_up_rows", "gate_up_bias"):
                was, now = getattr(block, rows)(expert), getattr(cut, rows)(expert)
                if was is not None and len(kept):
                    changed = (was[:, kept] - now[:, : len(kept)]).abs().flatten(2 if was.dim() == 3 else 1)
                    assert changed.gt(0).any()
                    assert changed.max() < was.abs().max()
        if model_type == "gpt_oss":
            assert not torch.equal(block.module.down_proj_bias, cut.module.down_proj_bias)
        else:
            own, other = mixture(dense, block).shared_expert, mixture(pruned, cut).shared_expert
            for name, weight in own.named_parameters():
                assert not torch.equal(weight, other.get_parameter(name)), name


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [("deepseek", "variable"), ("deepseek", "uniform"), ("gpt_oss", "padded")],
)
def test_cut_file_by_file(tmp_path, model_type, layout):
    model, data = tiny_model(model_type, moe_intermediate_size=16, intermediate_size=16), calibration_data(*LENGTHS)
    model.save_pretrained(tmp_path / "model")
    plan = PruningPlan.build(calibrate(model, data, 40), HeaprConfig(**FEW, layout=layout))
    pruner = HeaprPruner(model)
    pruner.calibration_data = data
    pruner.apply(plan)
    pruner.save_pretrained(tmp_path / "expected")
    done, plan.compensation, plan.reconstruction = plan.reconstruction, {}, {}
    (tmp_path / "out").mkdir()
    fitted = fit_checkpoint(tmp_path / "model", plan, tmp_path, data, activation_memory=0)
    write_streaming(tmp_path / "model", plan, tmp_path / "out", fitted=fitted)
    streamed, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert streamed.keys() == expected.keys()
    assert all(torch.equal(streamed[name], weight) for name, weight in expected.items())
    assert PruningPlan.load(tmp_path / "out").reconstruction == done
    assert "trained" in {block["kept"] for block in done.values()}


def test_one_layer_at_a_time_has_its_weights_in_memory_and_no_input_stays_there(tmp_path, monkeypatch):
    model, data = tiny_model("deepseek", num_hidden_layers=4), calibration_data(*LENGTHS)
    model.save_pretrained(tmp_path / "model")
    plan = PruningPlan.build(calibrate(model, data, 40), HeaprConfig(**FEW))
    loaded, held = [], []
    reconstruct_block, fitted = layer_by_layer.reconstruct_block, layer_by_layer._fitted

    def counted(model, *inputs):
        layers = enumerate(model.model.layers)
        loaded.append([number for number, layer in layers if any(not part.is_meta for part in layer.parameters())])
        return fitted(model, *inputs)

    def trained(*inputs):
        held.append([store.in_memory for store in stores])
        return reconstruct_block(*inputs)

    class Store(layer_by_layer.ActivationStore):
        def __init__(self, *inputs):
            super().__init__(*inputs)
            stores.append(self)

    stores = []
    monkeypatch.setattr(layer_by_layer, "ActivationStore", Store)
    monkeypatch.setattr(layer_by_layer, "_fitted", counted)
    monkeypatch.setattr(layer_by_layer, "reconstruct_block", trained)
    (tmp_path / "out").mkdir()
    fit_checkpoint(tmp_path / "model", plan, tmp_path / "out", data, activation_memory=0)
    layers = [number for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    assert loaded == [[number] for number in layers] and len(layers) > 1
    assert held == [[0]] * len(layers) and stores[0].most_on_disk > 0


def test_without_steps_nothing_is_trained(measured, monkeypatch):
    monkeypatch.setattr(layer_by_layer, "reconstruct_block", lambda *_: pytest.fail("something is trained"))
    pruned, plan = pruned_by(measured("qwen2_moe"), {**COMPENSATED, "reconstruction_steps": 0})
    assert plan.reconstruction == {}


def test_what_training_does_not_better_stays_as_it_was_fitted(measured, heapr_log):
    fitted, _ = pruned_by(measured("qwen2_moe"), COMPENSATED)
    spoilt, plan = pruned_by(measured("qwen2_moe"), {**FEW, "reconstruction_learning_rate": 1e30})
    for name, weight in fitted.state_dict().items():
        assert torch.equal(spoilt.state_dict()[name], weight)
    assert {done["kept"] for done in plan.reconstruction.values()} == {"fitted"}
    for done in plan.reconstruction.values():
        assert done["trained"] is done["share"] is None  # not finite, which JSON has no word for
    assert "not finite" in report_markdown(build_report(plan, "a/model"))
    assert "training did not make it better" in heapr_log.text


def test_it_goes_as_far_as_is_best_on_held_out_tokens(measured, monkeypatch):
    found = {}
    for shares in ((1.0,), (0.25,), (1.0, 0.25)):
        monkeypatch.setattr(reconstruction, "SHARES", shares)
        found[shares] = pruned_by(measured("qwen2_moe"), {**FEW, "protect": "*.layers.1.*"})
    ((path, far),) = found[1.0,][1].reconstruction.items()
    near, best = (found[shares][1].reconstruction[path] for shares in ((0.25,), (1.0, 0.25)))
    assert far["share"] == 1.0 and near["share"] == 0.25 and far["trained"] != near["trained"]
    assert best == min(far, near, key=lambda done: done["trained"])
    fitted, _ = pruned_by(measured("qwen2_moe"), {**COMPENSATED, "protect": "*.layers.1.*"})
    same = pruned_by(measured("qwen2_moe"), {**FEW, "protect": "*.layers.1.*"})[0].state_dict()
    chosen = found[(best["share"],)][0].state_dict()
    assert all(torch.equal(same[name], weight) for name, weight in chosen.items())
    assert not all(torch.equal(fitted.state_dict()[name], weight) for name, weight in chosen.items())


def test_the_same_seed_gives_the_same_model(measured):
    models = [pruned_by(measured("qwen3_moe"), {**FEW, "seed": seed})[0].state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(models[0][name], weight) for name, weight in models[1].items())
    assert not all(torch.equal(models[0][name], weight) for name, weight in models[2].items())


def test_padding_does_not_count_nor_do_micro_batches():
    model, data = tiny_model("qwen2_moe", dtype=torch.float64), calibration_data(30, 9, 22, 30, 5, 30, 17, 30)
    made = {}
    for batch_size in (1, 3):
        pruned, plan = pruned_by(
            (model, data, calibrate(model, data, 1)),
            {**OPTIONS, "batch_size": batch_size, "reconstruction_steps": 5, "reconstruction_learning_rate": 1e-3},
        )
        made[batch_size] = pruned.state_dict(), plan.reconstruction
    for name, weight in made[1][0].items():
        torch.testing.assert_close(made[3][0][name], weight, rtol=1e-6, atol=1e-8)
    for path, done in made[1][1].items():
        assert made[3][1][path]["trained"] == pytest.approx(done["trained"], rel=1e-6)


def test_a_protected_layer_stays_as_it_is(measured):
    dense, _, _ = measured("qwen2_moe")
    path = find_expert_blocks(dense)[0].path
    pruned, plan = pruned_by(measured("qwen2_moe"), {**FEW, "protect": path})
    assert path not in plan.reconstruction and len(plan.reconstruction) == len(plan.kept) - 1
    inside = path.rpartition(".")[0] + ".shared"
    for name, weight in dense.state_dict().items():
        assert not name.startswith(inside) or torch.equal(pruned.state_dict()[name], weight)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_layer_of_which_nothing_stays_is_not_trained(measured, model_type, heapr_log):
    model, data, statistics = measured(model_type)
    pruner = HeaprPruner(copy.deepcopy(model), config=HeaprConfig(**FEW))
    pruner.statistics, pruner.calibration_data, plan = statistics, data, pruner.plan(statistics)
    path, other = plan.kept
    plan.kept[path] = [
        part[:0] for part in plan.kept[path]
    ]  # but for biases of outputs, which training could change alone
    pruner.apply(plan)
    assert (
        list(plan.reconstruction) == [other] and f"{path}: nothing stays of it that could be trained" in heapr_log.text
    )
    ids = torch.stack(data.samples[:8])
    assert torch.isfinite(pruner.model(input_ids=ids).logits).all()


def test_too_little_text_is_said(heapr_log):
    model, data = tiny_model(), calibration_data(7)
    _, plan = pruned_by((model, data, calibrate(model, data, 1)), OPTIONS)
    assert plan.reconstruction == {} and "nothing held out of 7 tokens to train it by" in heapr_log.text


def test_what_is_not_finite_is_said_and_measures_no_number_of_experts(heapr_log):
    model, data = tiny_model(dtype=torch.float16), calibration_data(*(24,) * 8)
    statistics = calibrate(model, data, 8)
    model.model.layers[1].mlp.experts.gate_up_proj.data.mul_(1000)
    del statistics.fingerprint["model"]["weights"]
    _, plan = pruned_by((model, data, statistics), {**FEW, "criterion": "magnitude"})
    text = heapr_log.text
    assert "layers.1.mlp.experts: what it gives for the tokens held out is zero or not finite; it stays" in text
    assert "layers.1.mlp.experts: has activations that are not finite; it is cut without compensation" in text
    assert list(plan.reconstruction) == ["model.layers.0.mlp.experts"] and "nothing held out" not in text
    options = {**COMPENSATED, "layout": "uniform", "num_experts": "auto"}
    with pytest.raises(HeaprError, match=r"^num_experts='auto': model.layers.1.mlp.experts has .* not finite.*; load"):
        pruned_by((model, data, statistics), options)


def test_a_model_is_as_it_was_if_training_breaks_off(measured, monkeypatch):
    model, data, statistics = measured("qwen2_moe")
    model = copy.deepcopy(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    monkeypatch.setattr(reconstruction, "train", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    pruner = HeaprPruner(model, config=HeaprConfig(**OPTIONS))
    pruner.statistics, pruner.calibration_data = statistics, data
    with pytest.raises(torch.OutOfMemoryError):
        pruner.apply(pruner.plan())
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())
    monkeypatch.undo()
    pruner.apply(pruner.plan())


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
@torch.no_grad()
def test_a_masked_model_computes_what_the_pruned_one_does_and_is_then_as_it_was(measured, model_type):
    pruned, plan = pruned_by(measured(model_type), FEW)
    dense, data, statistics = measured(model_type)
    model, ids = copy.deepcopy(dense), data.samples[0].unsqueeze(0)
    again = PruningPlan.build(statistics, HeaprConfig(**FEW))
    with masked(model, again, statistics, data):
        logits = model(input_ids=ids).logits
    assert not again.reconstruction and "trained" in {done["kept"] for done in plan.reconstruction.values()}
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in dense.state_dict().items())
    expected = pruned(input_ids=ids).logits
    # As many float32 roundings as sums have terms, relative to the largest number.
    eps = torch.finfo(torch.float32).eps * 64 * expected.abs().max()
    torch.testing.assert_close(logits, expected, rtol=0, atol=float(eps))


def test_all_tokens_have_their_turn_before_one_has_its_second():
    tokens = torch.arange(5000) * 2
    batches = list(reconstruction._batches(tokens, 5, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [2048] * 5
    for first, second in ((0, 1), (2, 3)):
        assert len(torch.cat([batches[first], batches[second]]).unique()) == 4096
    assert set(torch.cat(batches).tolist()) <= set(tokens.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruction_steps": 600}, "reconstruction_steps=600: goes on from compensation over blocks; set"),
        (
            {"reconstruction_steps": 600, "compensate": True},
            "compensation_scope='block' too",
        ),
        ({**OPTIONS, "reconstruction_steps": -1}, "reconstruction_steps=-1: must be at least 0"),
        ({**OPTIONS, "reconstruction_learning_rate": -1.0}, "reconstruction_learning_rate=-1.0: must be at least 0"),
        ({**OPTIONS, "reconstruction_learning_rate": math.inf}, "must be a finite number"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(HeaprError, match=message):
        HeaprConfig(**options)


def test_training_without_room_is_refused_before_anything_is_measured(monkeypatch):
    model = tiny_model()
    block = find_expert_blocks(model)[0]
    fitting = block_compensation.fitting_bytes(block, 128 * 2048, 2) + reconstruction.inputs_bytes(block, 128 * 2048)
    needed = max(fitting, reconstruction.training_bytes(block, 128 * 2048, 2))
    monkeypatch.setattr(block_compensation, "available_bytes", lambda device: needed - 1)
    with pytest.raises(
        HeaprError, match=f"reconstruction_steps=60: needs {needed:,} bytes on .* for 128 samples of 2048 tokens"
    ):
        HeaprPruner(model, config=HeaprConfig(**OPTIONS)).prune()
    HeaprPruner(model, config=HeaprConfig(**COMPENSATED)).check()


def test_each_of_several_processes_needs_room_for_its_portion(monkeypatch):
    """128 samples, 40 in a micro-batch: four of these, so two of them for each of three processes, two of which are on this host."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    model = tiny_model()
    block, tokens = find_expert_blocks(model)[0], 80 * 2048
    needed = block_compensation.fitting_bytes(block, tokens, 2)
    monkeypatch.setattr(block_compensation, "available_bytes", lambda device: 2 * needed - 1)
    with pytest.raises(
        HeaprError, match=f"needs {needed:,} bytes on .* for 80 samples of 2048 tokens, and {needed - 1:,}"
    ):
        HeaprPruner(model, config=HeaprConfig(**COMPENSATED)).check()
    monkeypatch.setattr(block_compensation, "available_bytes", lambda device: 2 * needed)
    HeaprPruner(model, config=HeaprConfig(**COMPENSATED)).check()


@pytest.mark.parametrize("rank", [0, 1])
def test_that_processes_do_not_share_a_search_is_said_by_the_first(rank, monkeypatch, heapr_log):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", str(rank))
    model, options = tiny_model(), {**COMPENSATED, "ratio": None, "max_loss_increase": 0.1}
    block_compensation.check_block_memory(model, find_expert_blocks(model), HeaprConfig(**options))
    said = [
        "max_loss_increase=0.1: plans are measured, compensated and applied by the first of 3 processes; all calibrate"
    ]
    assert list(dict.fromkeys(heapr_log.messages)) == (said if rank == 0 else [])
