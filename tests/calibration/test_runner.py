# Licensed under the Apache License, Version 2.0
"""A calibration run: what must not leak into the statistics, and that the model comes back as it was."""

import dataclasses
import logging
import math

import pytest
import torch

from optimum_heapr.calibration.checks import warn_about_products
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.calibration.tap import CALIBRATION_IMPLEMENTATION
from optimum_heapr.cli.tables import statistics_table
from optimum_heapr.modeling import half_precision
from optimum_heapr.text.samples import CalibrationData
from optimum_heapr.utils.errors import HeaprError
from tests.helpers import assert_same_statistics, calibration_data, random_ids, tiny_model


def test_neither_dropout_nor_the_router_loss_leaks_in():
    """A model in training mode with an enormous auxiliary loss gives the statistics of the plain one."""
    data = calibration_data(16, 11)
    plain = tiny_model("qwen2_moe", dtype=torch.float64)
    training = tiny_model(
        "qwen2_moe",
        dtype=torch.float64,
        attention_dropout=0.5,
        output_router_logits=True,
        router_aux_loss_coef=1e3,
    ).train()
    assert torch.equal(plain.lm_head.weight, training.lm_head.weight)
    ids = random_ids()
    with_labels = training.eval()(input_ids=ids, labels=ids)
    assert with_labels.aux_loss is not None and with_labels.loss > 100, "the auxiliary loss is not even on"
    training.train()
    assert not torch.equal(training(input_ids=ids).logits, training(input_ids=ids).logits), "dropout is not even on"
    assert_same_statistics(calibrate(training, data), calibrate(plain, data), rtol=0)


def test_jitter_of_the_router_does_not_leak_in():
    data = calibration_data(16)
    plain = tiny_model("mixtral", dtype=torch.float64)
    training = tiny_model("mixtral", dtype=torch.float64, router_jitter_noise=0.9).train()
    assert_same_statistics(calibrate(training, data), calibrate(plain, data), rtol=0)


def test_the_calibration_loss_of_a_model_is_its_own_mean_loss():
    model, data = tiny_model("qwen3_moe"), calibration_data(16, 16)
    ids = torch.stack(data.samples)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    assert math.isclose(calibrate(model, data).fingerprint["loss"], expected, rel_tol=1e-5)


def snapshot(model):
    """Everything about a model that calibration could leave changed, except its weights."""
    return {
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "modes": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        },
        "buffers": [name for name, _ in model.named_buffers()],
        "experts": model.get_experts_implementation(),
        "config": model.config.to_dict(),
    }


def model_in_an_uncommon_state(**changes):
    model = tiny_model("qwen2_moe", **changes).train()
    model.model.layers[1].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    model.set_experts_implementation("batched_mm")
    return model


def test_the_model_comes_back_as_it_was():
    model = model_in_an_uncommon_state()
    before, weights = snapshot(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, calibration_data(8, 5), batch_size=2)
    assert snapshot(model) == before
    assert before["experts"] == {"": "batched_mm"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_comes_back_as_it_was_after_an_error(error):
    model, calls = model_in_an_uncommon_state(), []

    def fail(*_):
        assert model.get_experts_implementation() == {"": CALIBRATION_IMPLEMENTATION}
        calls.append(1)
        if len(calls) == 2:  # in the middle: the first micro-batch went through
            raise error("something went wrong")

    model.model.layers[1].mlp.experts.register_forward_hook(fail)
    before = snapshot(model)
    with pytest.raises(error, match="something went wrong"):
        calibrate(model, calibration_data(8, 8, 8))
    assert snapshot(model) == before


def test_a_loss_that_is_not_finite_is_refused_and_the_model_comes_back():
    model = model_in_an_uncommon_state()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    before = snapshot(model)
    with pytest.raises(
        HeaprError, match=r"loss=(nan|inf): not finite in micro-batch 0 \(samples \[0, 1\]\).*bfloat16"
    ):
        calibrate(model, calibration_data(8, 8, 8), batch_size=2)
    assert snapshot(model) == before


def test_a_gradient_that_is_not_finite_is_refused():
    """The loss can be finite where a gradient is not."""
    model = poisoned_model("gradient")
    with pytest.raises(
        HeaprError,
        match=r"gradients of model\.layers\.0\.mlp\.experts: not finite in micro-batch 1 \(samples \[2, 3\]\)",
    ):
        calibrate(model, poisoned_data(), batch_size=2)


def test_a_gradient_whose_square_overflows_is_refused():
    model = tiny_model("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[:, 12:] *= 1e-25
        experts.down_proj *= 1e25
    with pytest.raises(HeaprError, match=r"gradients of model\.layers\.0\.mlp\.experts: not finite in micro-batch 0"):
        calibrate(model, calibration_data(8))


def poisoned_data():
    """Token 7, which only samples 2 and 5 hold, is the one whose gradients overflow."""
    data = calibration_data(*[8] * 6)
    samples = [torch.where(sample == 7, 8, sample) for sample in data.samples]
    samples[2][3] = samples[5][0] = 7
    return CalibrationData(samples, "poisoned", 0, 8)


def poisoned_model(kind):
    model = tiny_model("qwen3_moe", dtype=torch.float32 if kind == "gradient" else torch.float64)
    if kind == "loss":
        with torch.no_grad():
            model.model.embed_tokens.weight[7] = torch.nan
        return model

    def poison_gradient(module, args, output):
        if poison["now"] and output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)

    poison = {"now": False}
    model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: poison.update(now=bool((args[0] == 7).any()))
    )
    model.model.layers[0].mlp.register_forward_hook(poison_gradient)
    return model


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("gram", [False, True])
def test_what_is_not_finite_is_left_out_without_a_trace(kind, gram, heapr_log):
    """The statistics are, bit for bit, those of the data without these micro-batches."""
    data, model = poisoned_data(), poisoned_model(kind)
    statistics = calibrate(model, data, batch_size=2, gram=gram, skip_nonfinite=True)
    clean = CalibrationData(data.samples[:2], "clean", 0, 8)
    expected = calibrate(model, clean, batch_size=2, gram=gram, skip_nonfinite=True)
    for path, block in expected.blocks.items():
        for part in dataclasses.fields(block):
            value = getattr(block, part.name)
            assert value is None or torch.equal(getattr(statistics.blocks[path], part.name), value), part.name
    assert statistics.fingerprint["loss"] == expected.fingerprint["loss"]
    assert statistics.fingerprint["skipped"] == [2, 3, 4, 5]
    assert statistics.num_tokens == 16 and statistics.fingerprint["data"]["num_samples"] == 2
    assert "not finite in micro-batch 1, left out (samples [2, 3])" in heapr_log.text
    assert "left out 4 samples that were not finite: [2, 3, 4, 5]" in statistics_table(statistics)


def test_leaving_out_changes_nothing_where_all_is_finite():
    model, data = tiny_model("qwen3_moe"), calibration_data(8, 5, 7)
    plain, careful = calibrate(model, data), calibrate(model, data, skip_nonfinite=True)
    assert_same_statistics(careful, plain, rtol=0)
    assert careful.fingerprint == plain.fingerprint


def test_nothing_but_what_is_not_finite_is_refused():
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(HeaprError, match="every micro-batch was left out; load the model in bfloat16"):
        calibrate(model, calibration_data(8, 8), skip_nonfinite=True)


@pytest.mark.parametrize(("token", "span"), [(320, "5 to 320"), (-1, "-1 to 7")])
def test_token_ids_without_an_embedding_are_refused(token, span):
    """On a GPU an index out of range ends the process."""
    model, samples = tiny_model(), [torch.tensor([5, 319]), torch.tensor([5, 7, token])]
    assert model.config.vocab_size == 320
    match = f"dataset='x': sample 1 has token ids from {span}, the model knows 0 to 319; use ids made by the tokenizer"
    with pytest.raises(HeaprError, match=match):
        calibrate(model, CalibrationData(samples, "x", 0, 3))


def test_experts_that_do_not_follow_the_switch_are_refused(monkeypatch):
    """Otherwise nothing would be measured and every expert would look as if no token had reached it."""
    model = tiny_model("qwen3_moe")
    monkeypatch.setattr(type(model), "_can_set_experts_implementation", classmethod(lambda cls: False))
    before = snapshot(model)
    with pytest.raises(HeaprError, match=r"model\.layers\.0\.mlp\.experts does not follow set_experts_implementation"):
        calibrate(model, calibration_data(8))
    assert snapshot(model) == before


def test_a_calibrated_model_still_computes_the_same_and_trains():
    model, ids = tiny_model("qwen3_moe"), random_ids()
    before = model(input_ids=ids).logits
    calibrate(model, calibration_data(8))
    assert torch.equal(model(input_ids=ids).logits, before)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.layers[1].mlp.parameters())


def test_unreached_experts_are_named_in_a_warning(heapr_log):
    model = tiny_model("qwen3_moe")
    statistics = calibrate(model, calibration_data(2))  # two tokens, two experts each, six experts a layer
    unreached = statistics.unreached
    assert list(unreached) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for path, experts in unreached.items():
        assert experts == [e for e in range(6) if statistics.blocks[path].token_count[e] == 0]
        assert f"{path}: {experts}" in heapr_log.text
    message = heapr_log.records[-1].getMessage()
    assert message.startswith(f"{sum(map(len, unreached.values()))} experts were reached by no calibration token")
    for step in ("num_samples", "protect_unreached=True", "min_width"):
        assert step in message
    assert heapr_log.records[-1].levelno == logging.WARNING


@pytest.mark.parametrize("dtype, there, said", [("bfloat16", False, 1), ("float32", False, 0), ("bfloat16", True, 0)])
def test_a_type_that_the_cpu_is_slow_in_is_named_before_the_first_batch(dtype, there, said, heapr_log, monkeypatch):
    monkeypatch.setattr(half_precision, "_has_products", lambda dtype: there or dtype == torch.float32)
    calibrate(tiny_model("qwen3_moe").to(getattr(torch, dtype)), calibration_data(8))
    messages = [record.getMessage() for record in heapr_log.records]
    found = [message for message in messages if "no instructions for products in bfloat16" in message]
    assert len(found) == said
    assert not said or (messages[0] == found[0] and "dtype='float32'" in found[0])


def test_of_several_processes_the_first_alone_names_that_type(heapr_log, monkeypatch):
    monkeypatch.setattr(half_precision, "_has_products", lambda dtype: False)
    for rank in "10":
        assert not heapr_log.records
        monkeypatch.setenv("RANK", rank)
        warn_about_products(torch.bfloat16, torch.device("cpu"))
    assert len(heapr_log.records) == 1


def test_without_unreached_experts_there_is_no_warning(heapr_log):
    statistics = calibrate(tiny_model("qwen3_moe"), calibration_data(*[32] * 8), batch_size=4)
    assert statistics.unreached == {}
    assert "reached" not in heapr_log.text


def test_experts_with_few_tokens_are_counted_in_a_warning(heapr_log):
    """Twelve atomic experts an expert; ten tokens go to two of six experts each."""
    statistics = calibrate(tiny_model("qwen3_moe"), calibration_data(10))
    counts = [count for block in statistics.blocks.values() for count in block.token_count.tolist()]
    few = [count for count in counts if 0 < count < 12]
    assert few
    message = next(r.getMessage() for r in heapr_log.records if "wide" in r.getMessage())
    assert message.startswith(
        f"{len(few)} experts were reached by fewer tokens than they are wide, the least by {min(few)}"
    )
    assert f"Raise num_samples (now 1; about {-(-12 // min(few))} would do" in message


def test_the_data_and_the_model_are_in_the_fingerprint():
    model, data = tiny_model("qwen3_moe"), calibration_data(8, 5, seed=3)
    fingerprint = calibrate(model, data).fingerprint
    assert fingerprint["model"]["model_type"] == "qwen3_moe"
    assert fingerprint["model"]["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert fingerprint["model"]["parameters_per_atomic_expert"] == 3 * model.config.hidden_size
    assert fingerprint["data"] == data.fingerprint
    assert fingerprint["data"]["num_tokens"] == 13 and fingerprint["data"]["num_samples"] == 2
    assert (fingerprint["seed"], fingerprint["seq_length"]) == (3, 8)
    other = CalibrationData([data.samples[0], data.samples[1] + 1], "random tokens", 3, 8)
    assert other.fingerprint["sha256"] != data.fingerprint["sha256"]
    # The same ids in one stream, cut elsewhere, are other samples.
    joined = torch.cat(data.samples)
    moved = CalibrationData([joined[:5], joined[5:]], "random tokens", 3, 8)
    assert moved.fingerprint["sha256"] != data.fingerprint["sha256"]
