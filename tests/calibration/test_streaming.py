# Licensed under the Apache License, Version 2.0
"""Calibration layer by layer gives the statistics of the plain run, from a checkpoint whose weights are read twice."""

import dataclasses
import functools
import itertools
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.calibration import streaming
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.families import TESTED
from optimum_heapr.layerwise import walk
from optimum_heapr.layerwise.layers import check_layers
from optimum_heapr.layerwise.source import SourceCheckpoint
from optimum_heapr.modeling import half_precision
from optimum_heapr.planning.plan import PruningPlan
from optimum_heapr.text.samples import CalibrationData
from optimum_heapr.utils.errors import HeaprError
from optimum_heapr.utils.tensor_files import checkpoint_files
from tests.calibration.test_runner import poisoned_data
from tests.helpers import assert_same_statistics, calibration_data, random_ids, tiny_model
from tests.modeling.test_families import make_model


def streamed(folder, data, work, **options):
    """Statistics, and where the weights came from."""
    skeleton, _ = load_model(folder, skeleton=True)
    source = SourceCheckpoint(skeleton, checkpoint_files(str(folder)))
    work.mkdir(exist_ok=True)
    return streaming.calibrate_streaming(skeleton, source, data, work, **options), source


def padded_data(vocabulary=96):
    ids = torch.randint(3, vocabulary, (7, 24), generator=torch.Generator().manual_seed(1))
    return CalibrationData([row[: 24 - 5 * (number % 3)] for number, row in enumerate(ids)], "random", 0, 24)


@pytest.mark.parametrize("model_type", TESTED)
def test_every_family_gives_the_statistics_of_the_plain_run(model_type, tmp_path):
    make_model(model_type).save_pretrained(tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    data = padded_data()
    plain = calibrate(model, data, batch_size=2, gram=True)
    statistics, _ = streamed(tmp_path / "model", data, tmp_path / "work", batch_size=2, gram=True)
    assert_same_statistics(statistics, plain, rtol=1e-5)
    assert statistics.fingerprint == plain.fingerprint
    for path, block in plain.blocks.items():
        assert torch.equal(statistics.blocks[path].weight_norm, block.weight_norm)
        for name in ("activation_gram_sum", "gradient_gram_sum"):
            expected = getattr(block, name)
            torch.testing.assert_close(
                getattr(statistics.blocks[path], name), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
            )
    config = HeaprConfig(ratio=0.3)
    kept = PruningPlan.build(statistics, config).kept
    for path, experts in PruningPlan.build(plain, config).kept.items():
        assert all(torch.equal(one, other) for one, other in zip(kept[path], experts, strict=True))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with a dense first layer, tied embeddings, and files of several tensors each."""
    model = tiny_model("deepseek", num_hidden_layers=4, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def test_the_next_layer_is_read_ahead(folder, tmp_path, monkeypatch):
    """While a layer is computed with, forward and backward, the system is told which comes next; of none that does not."""
    events = []

    def recorded(name):
        plain = getattr(SourceCheckpoint, name)

        def call(self, what, *arguments):
            names = {what} if isinstance(what, str) else set(what)
            events.append((name, {part.split(".")[2] for part in names if ".layers." in part}))
            return plain(self, what, *arguments)

        monkeypatch.setattr(SourceCheckpoint, name, call)

    recorded("load")
    recorded("read_ahead")
    streamed(folder, padded_data(), tmp_path / "work")
    order = [(name, *layers) for name, layers in events if layers]
    order = [event for event, _ in itertools.groupby(order)]  # a layer has many weights
    forward, backward = ["0", "1", "2", "3"], ["3", "2", "1"]  # the first layer has no experts
    expected = []
    for passed in (forward, backward):
        for layer, then in itertools.zip_longest(passed, passed[1:]):
            expected += [("load", layer)] + ([("read_ahead", then)] if then else [])
    assert order == [event for event, _ in itertools.groupby(expected)]


def assert_equal_bits(actual, expected):
    assert actual.fingerprint == expected.fingerprint and list(actual.blocks) == list(expected.blocks)
    for path, block in expected.blocks.items():
        for part in dataclasses.fields(block):
            one, other = getattr(actual.blocks[path], part.name), getattr(block, part.name)
            assert (one is None and other is None) or torch.equal(one, other), f"{path}.{part.name}"


def test_each_layer_is_read_twice_and_alone(folder, tmp_path, monkeypatch):
    reads, call, at_once = Counter(), walk.LayerWalk.call, set()

    def counted(self, name, device):
        reads[name] += 1
        return load(self, name, device)

    def looked_at(self, number, *arguments):
        there = [any(p.device.type != "meta" for p in layer.parameters()) for layer in self.decoder.layers]
        at_once.add(tuple(index for index, found in enumerate(there) if found) == (number,))
        rest = self.decoder.model.get_input_embeddings().weight
        assert rest.device.type == "meta", "embeddings and head are there when they compute"
        return call(self, number, *arguments)

    load = SourceCheckpoint.load
    monkeypatch.setattr(SourceCheckpoint, "load", counted)
    monkeypatch.setattr(walk.LayerWalk, "call", looked_at)
    statistics, source = streamed(folder, calibration_data(8, 5, 7), tmp_path / "work")
    assert at_once == {True}
    assert set(reads) == set(source.stored)
    for name, count in reads.items():
        assert count == (1 if ".layers.0." in name else 2), name  # the dense first layer has no backward
    model, _ = load_model(folder)
    assert_equal_bits(statistics, calibrate(model, calibration_data(8, 5, 7)))
    assert all(parameter.device.type == "meta" for parameter in source.empty.values())


def test_activations_past_the_budget_go_to_disk(folder, tmp_path, monkeypatch):
    data, stores = calibration_data(8, 5, 7, 8), []
    plain, _ = streamed(folder, data, tmp_path / "work", activation_memory=2**30)
    assert not list((tmp_path / "work").glob("hidden*"))

    class Watched(streaming.ActivationStore):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            stores.append(self)

    monkeypatch.setattr(streaming, "ActivationStore", Watched)
    for budget in (0, 5000):
        statistics, _ = streamed(folder, data, tmp_path / f"work{budget}", activation_memory=budget)
        assert_equal_bits(statistics, plain)
        assert stores[-1].most_in_memory <= budget and stores[-1].most_on_disk > 2000
        left = [path.name for path in (tmp_path / f"work{budget}").iterdir() if "block" not in path.name]
        assert {name.split(".")[0] for name in left} <= {"argument"}, "inputs are dropped behind the layer"


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("calls", [6, 12, 14, 20])
def test_killed_and_resumed(calls, gram, folder, tmp_path, monkeypatch):
    """At any moment: 12 calls of layers in the forward of 3 micro-batches, and 9 in the backward."""
    data, options = calibration_data(8, 5, 7), {"gram": gram, "resumable": True}
    expected, _ = streamed(folder, data, tmp_path / "unbroken", gram=gram)
    call, seen = walk.LayerWalk.call, []

    def killed(self, *arguments):
        seen.append(1)
        if len(seen) == calls:
            raise KeyboardInterrupt
        return call(self, *arguments)

    monkeypatch.setattr(walk.LayerWalk, "call", killed)
    with pytest.raises(KeyboardInterrupt):
        streamed(folder, data, tmp_path / "work", **options)
    with pytest.raises(HeaprError, match=r"saved by a run that differs \(.*sha256"):
        streamed(folder, calibration_data(8, 5, 6), tmp_path / "work", **options)
    done, calls = calls - 1, 0
    seen.clear()
    statistics, _ = streamed(folder, data, tmp_path / "work", **options)
    assert_equal_bits(statistics, expected)
    assert len(seen) == 21 - 3 * (done // 3), "layers that were done are not done again"


def test_a_type_that_the_cpu_is_slow_in_is_named_before_the_first_layer(tmp_path, monkeypatch, heapr_log):
    monkeypatch.setattr(half_precision, "_has_products", lambda dtype: dtype == torch.float32)
    tiny_model("qwen3_moe").bfloat16().save_pretrained(tmp_path / "model")
    streamed(tmp_path / "model", padded_data(), tmp_path / "work")
    assert "no instructions for products in bfloat16" in heapr_log.records[0].getMessage()


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_is_left_out_without_a_trace(kind, folder, tmp_path, monkeypatch, heapr_log):
    data = poisoned_data()
    tiny_model("deepseek", num_hidden_layers=4).save_pretrained(folder, max_shard_size="20KB")  # a head of its own
    if kind == "loss":
        poison_embedding(folder)
    else:
        poison_gradients(monkeypatch, "model.layers.2")
    with pytest.raises(HeaprError, match=r"not finite in micro-batch 1 \(samples \[2, 3\]\)"):
        streamed(folder, data, tmp_path / "refused", batch_size=2)
    statistics, _ = streamed(folder, data, tmp_path / "work", batch_size=2, skip_nonfinite=True)
    clean = CalibrationData(data.samples[:2], "clean", 0, 8)
    expected, _ = streamed(folder, clean, tmp_path / "clean", batch_size=2)
    assert_same_statistics(statistics, expected, rtol=0)
    assert statistics.fingerprint["loss"] == expected.fingerprint["loss"]
    assert statistics.fingerprint["skipped"] == [2, 3, 4, 5] and statistics.cost.tokens == 16
    assert "not finite in micro-batch 1, left out (samples [2, 3])" in heapr_log.text


def poison_embedding(folder):
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"][7] = torch.nan
            save_file(tensors, file, {"format": "pt"})


def poison_gradients(monkeypatch, layer):
    """The gradients of one layer are not finite where a micro-batch has the token 7."""
    batch_now, look, begin = [], streaming.what_is_not_finite, streaming.begin_micro_batch

    def begun(blocks, accumulators, batch):
        batch_now[:] = [batch]
        begin(blocks, accumulators, batch)

    def poisoned(accumulators):
        bad = (batch_now[0]["input_ids"] == 7).any() and any(path.startswith(layer) for path in accumulators)
        return "gradients" if bad else look(accumulators)

    monkeypatch.setattr(streaming, "begin_micro_batch", begun)
    monkeypatch.setattr(streaming, "what_is_not_finite", poisoned)


def test_layers_that_need_more_than_hidden_states_are_refused(folder, tmp_path, monkeypatch):
    from optimum_heapr.modeling.modeling_deepseek import DeepseekModel

    forward = DeepseekModel.forward

    def refused(reason, edit):
        def edited(self, *arguments, **options):
            with replaced(self, edit):
                return forward(self, *arguments, **options)

        monkeypatch.setattr(DeepseekModel, "forward", edited)
        with pytest.raises(HeaprError, match=f"cannot be calibrated layer by layer: {reason}.*use memory='offload'"):
            streamed(folder, calibration_data(8), tmp_path / "work")
        skeleton, _ = load_model(folder, skeleton=True)
        with pytest.raises(HeaprError, match=reason):  # the same is known without reading a weight
            check_layers(skeleton, SourceCheckpoint(skeleton, checkpoint_files(str(folder))))

    @contextmanager
    def replaced(model, edit):
        called = [(layer, layer.__dict__.get("forward")) for layer in model.layers]
        seen = []
        for layer, inner in called:
            layer.forward = functools.partial(edit, inner, seen)
        try:
            yield
        finally:
            for layer, inner in called:
                layer.forward = inner

    refused("its layers share 'memory', a dict", lambda inner, seen, h, *a, **k: inner(h, *a, memory={}, **k))
    refused("what layer 1 is given is not what layer 0", lambda inner, seen, h, *a, **k: inner(h, *a, **k) * 1)

    def hand_on(inner, seen, hidden, *arguments, **options):
        seen.append(hidden)
        return inner(hidden, *arguments, first=seen[0], **options)

    refused("'first' is made of hidden states", hand_on)


def test_logits_that_need_other_layers_are_refused(folder, tmp_path, monkeypatch):
    from optimum_heapr.modeling.modeling_deepseek import DeepseekModel

    forward = DeepseekModel.forward

    def summed(self, *arguments, **options):
        outputs, handles = [], []
        for layer in self.layers:
            handles.append(layer.register_forward_hook(lambda module, args, output: outputs.append(output)))
        result = forward(self, *arguments, **options)
        for handle in handles:
            handle.remove()
        result.last_hidden_state = result.last_hidden_state + outputs[1]
        return result

    monkeypatch.setattr(DeepseekModel, "forward", summed)
    with pytest.raises(HeaprError, match="its logits depend on the outputs of other layers than the last"):
        streamed(folder, calibration_data(8), tmp_path / "work")


def test_a_model_that_was_never_loaded_is_pruned_as_one_that_was(tmp_path):
    tiny_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    config = HeaprConfig(ratio=0.4, criterion="obs", compensate=True, num_samples=12, seq_length=16, batch_size=2)
    rows = Dataset.from_dict({"input_ids": random_ids(12, 16).tolist()})
    estimates = []
    for memory in ("plain", "offload", "streaming"):
        options = {} if memory == "plain" else {"offload_folder": tmp_path / "offload"}
        pruner = HeaprPruner.from_pretrained(tmp_path / "model", config, memory=memory, **options)
        pruner.calibrate(rows)
        pruner.prune()
        pruner.save_pretrained(tmp_path / memory)
        estimates.append(pruner.applied_plan.estimated_loss_increase)
    assert all(parameter.device.type == "meta" for parameter in pruner.model.parameters())
    block = next(iter(pruner.statistics.blocks.values()))
    assert block.has_curves and block.has_grams
    assert estimates == pytest.approx([estimates[0]] * 3) and estimates[0] > 0
    curves = pruner.calibrate(rows, keep_grams=False)
    assert all(block.has_curves and block.activation_gram_sum is None for block in curves.blocks.values())
    with pytest.raises(HeaprError, match="compensate=True: needs second-order statistics"):
        pruner.prune()
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for memory in ("offload", "streaming"):
        weights = load_file(tmp_path / memory / "model.safetensors")
        assert weights.keys() == plain.keys()
        for name, tensor in plain.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)
    with pytest.raises(HeaprError, match="save_original_format: is for a model in memory"):
        pruner.save_pretrained(tmp_path / "packed", save_original_format=False)


def test_state_of_the_other_kind_is_refused(folder, tmp_path):
    rows = Dataset.from_dict({"input_ids": random_ids(2, 8).tolist()})
    options = {"state_path": tmp_path / "state", "resume": True}
    pruner = HeaprPruner.from_pretrained(folder, memory="streaming")
    (tmp_path / "state").write_text("")
    with pytest.raises(HeaprError, match="was saved by a calibration that is not streaming"):
        pruner.calibrate(rows, **options)
    (tmp_path / "state").unlink()
    pruner.calibrate(rows, keep_state=True, **options)
    assert (tmp_path / "state").is_dir()
    with pytest.raises(HeaprError, match="interrupted here; pass resume=True"):
        pruner.calibrate(rows, state_path=tmp_path / "state")
    with pytest.raises(HeaprError, match="was saved by a calibration that is streaming"):
        HeaprPruner.from_pretrained(folder).calibrate(rows, **options)
    pruner.calibrate(rows, **options)
    assert not (tmp_path / "state").exists()
