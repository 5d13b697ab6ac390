# Licensed under the Apache License, Version 2.0
"""Tensors of a pruned checkpoint carry the family's own names and the kept rows of the family's own tensors."""

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from optimum_heapr import HeaprConfig, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.modeling.conversion import (
    PackDown,
    PackGateUp,
    UnpackDown,
    UnpackGateUp,
    _widths,
    register_conversions,
)
from optimum_heapr.surgery.apply import apply_plan
from tests.helpers import calibration_data, tiny_model


# What the family calls an expert's parts; gpt_oss has none of its own, it stores all experts in one tensor.
NAMES = {
    "qwen2_moe": ("mlp.experts.{}.", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("mlp.experts.{}.", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.experts.{}.", "w1", "w3", "w2"),
    "deepseek_v2": ("mlp.experts.{}.", "gate_proj", "up_proj", "down_proj"),
    "gpt_oss": ("mlp.experts.{}.", "gate_proj", "up_proj", "down_proj"),
}


@pytest.fixture(scope="module", params=NAMES)
def stored(request, tmp_path_factory):
    """Model type, plan, tensors of the unpruned checkpoint, tensors of the pruned one."""
    folder, model = tmp_path_factory.mktemp(request.param), tiny_model(request.param)
    model.save_pretrained(folder / "unpruned")
    plan = PruningPlan.build(calibrate(model, calibration_data(24, 24)), HeaprConfig(ratio=0.4))
    list(plan.kept.values())[0][2] = torch.empty(0, dtype=torch.int64)
    apply_plan(model, plan).save_pretrained(folder / "pruned")
    return request.param, plan, *(load_file(folder / name / "model.safetensors") for name in ("unpruned", "pruned"))


def test_expert_tensors_are_rows_of_the_unpruned_ones(stored):
    model_type, plan, unpruned, pruned = stored
    pattern, *parts = NAMES[model_type]
    seen = set()
    for path, experts in plan.kept.items():
        layer = re.match(r"model\.layers\.\d+\.", path)[0]
        for expert, kept in enumerate(experts):
            names = [f"{layer}{pattern.format(expert)}{part}.weight" for part in parts]
            gate, up, down = (pruned[name] for name in names)
            seen |= set(names)
            if model_type == "gpt_oss":
                prefix = f"{layer}mlp.experts."
                gate_up = unpruned[f"{prefix}gate_up_proj"][expert].T
                expected = gate_up[::2][kept], gate_up[1::2][kept], unpruned[f"{prefix}down_proj"][expert][kept].T
                bias = unpruned[f"{prefix}gate_up_proj_bias"][expert]
                biases = [name.replace(".weight", ".bias") for name in names[:2]]
                assert torch.equal(pruned[biases[0]], bias[::2][kept])
                assert torch.equal(pruned[biases[1]], bias[1::2][kept])
                seen |= {*biases, f"{prefix}down_proj_bias"}
                assert torch.equal(pruned[f"{prefix}down_proj_bias"], unpruned[f"{prefix}down_proj_bias"])
            else:
                expected = unpruned[names[0]][kept], unpruned[names[1]][kept], unpruned[names[2]][:, kept]
            for actual, wanted in zip((gate, up, down), expected):
                assert actual.shape == wanted.shape and torch.equal(actual, wanted)
    assert seen == {name for name in pruned if ".experts." in name}


def test_other_tensors_are_as_they_were(stored):
    _, _, unpruned, pruned = stored
    others = {name: tensor for name, tensor in unpruned.items() if ".experts." not in name}
    assert others.keys() == {name for name in pruned if ".experts." not in name}
    assert all(torch.equal(pruned[name], tensor) for name, tensor in others.items())


def test_shared_experts_are_no_experts(stored):
    model_type, _, unpruned, pruned = stored
    shared = [name for name in unpruned if "shared_expert" in name]
    assert bool(shared) == (model_type in ("qwen2_moe", "deepseek_v2"))
    assert all(torch.equal(unpruned[name], pruned[name]) for name in shared)


class Model:
    """What unpacking reads of a model."""

    def __init__(self, device_map=None, **widths):
        self.hf_device_map = device_map
        self.config = type("Config", (), {"expert_widths": widths})()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("widths", [[3, 1, 2], [2, 2, 2], [0, 4, 0], [0, 0, 0]])
@pytest.mark.parametrize("columns", [(5,), ()], ids=["weights", "biases"])
def test_packing_gates_and_ups_has_an_inverse(widths, interleaved, columns):
    gates, ups = ([torch.randn(width, *columns) for width in widths] for _ in range(2))
    pack = PackGateUp(interleaved)
    packed = pack.convert({"gate.*": list(gates), "up.*": list(ups)}, ["gate.*", "up.*"], ["packed"])["packed"]
    assert packed.shape == (2 * sum(widths), *columns)
    widest = widths.index(max(widths))  # it comes first
    first = torch.stack([gates[widest], ups[widest]], int(interleaved)).flatten(0, 1)
    assert torch.equal(packed[: len(first)], first)

    assert isinstance(pack.reverse_op.reverse_op, PackGateUp)
    assert isinstance(pack.reverse_op, UnpackGateUp)
    assert pack.reverse_op.interleaved == pack.reverse_op.reverse_op.interleaved == interleaved
    model = Model(**{"layers.0.experts": widths})
    unpacked = pack.reverse_op.convert(
        {"packed": [packed]}, ["packed"], ["gate.*", "up.*"], model=model, full_layer_name="layers.0.experts.gate_up"
    )
    assert unpacked.keys() == {f"{part}.{expert}" for part in ("gate", "up") for expert in range(3)}
    for expert in range(3):
        assert torch.equal(unpacked[f"gate.{expert}"], gates[expert])
        assert torch.equal(unpacked[f"up.{expert}"], ups[expert])
        # Or there would be two of it until all files are written.
        assert unpacked[f"gate.{expert}"].untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


@pytest.mark.parametrize("widths", [[3, 1, 2], [2, 2, 2], [0, 4, 0], [0, 0, 0]])
def test_packing_downs_has_an_inverse(widths):
    downs = [torch.randn(5, width) for width in widths]
    packed = PackDown().convert({"down.*": list(downs)}, ["down.*"], ["packed"])["packed"]
    assert packed.shape == (sum(widths), 5)
    assert isinstance(PackDown().reverse_op, UnpackDown) and isinstance(UnpackDown().reverse_op, PackDown)
    unpacked = UnpackDown().convert(
        {"packed": packed},
        ["packed"],
        ["down.*"],
        model=Model(**{"layers.0.experts": widths}),
        full_layer_name="layers.0.experts.down_proj",
    )
    for expert, down in enumerate(downs):
        assert torch.equal(unpacked[f"down.{expert}"], down)
        assert unpacked[f"down.{expert}"].untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_of_offloaded_models_all_parts_are_contiguous():
    """Or writing them would fail: they are unpacked as the last step."""
    model = Model(device_map={"layers.0": "cpu", "layers.1": "disk"}, **{"layers.0.experts": [3, 2]})
    gates = UnpackGateUp(True).convert(
        {"packed": torch.randn(10, 4)},
        ["packed"],
        ["gate.*", "up.*"],
        model=model,
        full_layer_name="layers.0.experts.x",
    )
    downs = UnpackDown().convert(
        {"packed": torch.randn(5, 4)}, ["packed"], ["down.*"], model=model, full_layer_name="layers.0.experts.x"
    )
    assert len(gates) + len(downs) == 6 and all(part.is_contiguous() for part in (*gates.values(), *downs.values()))


@pytest.mark.parametrize("taken_out", [True, False])
def test_packing_takes_the_sources_that_there_are(taken_out):
    """Quantizers name what they store beside the weights, in between; what they read is taken out before."""
    gates, ups, downs = (
        [torch.randn(*shape) for shape in shapes] for shapes in ([(2, 5), (1, 5)],) * 2 + ([(5, 2), (5, 1)],)
    )

    def packed(operation, **parts):
        names = [f"{part}.*.{kind}" for part in parts for kind in ("weight", "weight_scale", "weight_packed")]
        there = {f"{part}.*.weight": list(tensors) for part, tensors in parts.items()}
        sources = names if taken_out else list(there)
        return operation.convert(there, sources, ["packed"])["packed"]

    assert torch.equal(packed(PackGateUp(), gate=gates, up=ups), torch.cat([gates[0], ups[0], gates[1], ups[1]]))
    assert torch.equal(packed(PackDown(), down=downs), torch.cat([downs[0].T, downs[1].T]))


def test_widths_are_found_by_layer():
    widths = {f"model.layers.{layer}.mlp.experts": [layer] for layer in (1, 11)}
    model = Model(**widths)
    assert _widths(model, "model.layers.1.mlp.experts.gate_up_proj") == [1]
    assert _widths(model, "model.layers.11.mlp.experts.gate_up_proj") == [11]
    # The checkpoint's own name for the block.
    assert _widths(model, "model.layers.11.block_sparse_moe.experts.3.w1.weight") == [11]
    with pytest.raises(KeyError, match="0 blocks of this layer"):
        _widths(model, "model.layers.2.mlp.experts.gate_up_proj")
    two = Model(**{"a.layers.0.experts": [1], "b.layers.0.experts": [2]})
    assert _widths(two, "b.layers.0.experts.down_proj") == [2]
    with pytest.raises(KeyError, match="2 blocks of this layer"):
        _widths(two, "c.layers.0.experts.down_proj")


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_registering_leaves_the_family_alone(model_type):
    def described(name):
        mapping = get_checkpoint_conversion_mapping(name) or []
        return [(type(entry), entry.source_patterns, entry.target_patterns) for entry in mapping]

    before = described(model_type)
    register_conversions(f"heapr_{model_type}", model_type == "gpt_oss", model_type == "gpt_oss")
    first = described(f"heapr_{model_type}")
    register_conversions(f"heapr_{model_type}", model_type == "gpt_oss", model_type == "gpt_oss")
    assert described(model_type) == before and described(f"heapr_{model_type}") == first
    assert len(first) >= (3 if model_type == "gpt_oss" else 2)
