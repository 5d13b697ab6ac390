# Licensed under the Apache License, Version 2.0
"""Checkpoints of llm-compressor, dequantized whole and file by file.

Skipped where compressed-tensors is not installed; `tests/surgery/run_quantizers.sh` makes an environment that has it.
"""

import json

import pytest
import torch
from transformers.utils import is_compressed_tensors_available

from optimum_heapr import HeaprPruner
from optimum_heapr.checkpoints.loading import load_model, source_of
from optimum_heapr.checkpoints.saving import apply_streaming
from optimum_heapr.utils.errors import HeaprError
from tests.checkpoints.test_dequantizing import files_of
from tests.quantized_checkpoints import compressed_checkpoint, decompressed, tensors_of
from tests.surgery.stock_models import layout_plan, logits_of


KINDS = ("FP8", "W4A16")
needs_library = pytest.mark.skipif(not is_compressed_tensors_available(), reason="no compressed-tensors here")


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_what_the_bits_stand_for(kind, tmp_path):
    folder = compressed_checkpoint(tmp_path, kind)
    stored, (model, _) = tensors_of(folder), load_model(folder, dequantize=True)
    source = source_of(load_model(folder, skeleton=True, dequantize=True)[0])
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.load(name, torch.device("cpu")), tensor), name
    path = source.blocks[1].path
    expected = {
        f"{path}.down_proj": decompressed(stored, f"{path}.3.down_proj"),
        f"{path}.gate_up_proj": torch.cat([decompressed(stored, f"{path}.3.{part}_proj") for part in ("gate", "up")]),
    }
    for name, values in expected.items():
        torch.testing.assert_close(source.parameter(name, 3)[0].float(), values, rtol=2**-8, atol=0)
    attention = "model.layers.1.self_attn.q_proj"
    found = model.get_parameter(f"{attention}.weight").float()
    torch.testing.assert_close(found, decompressed(stored, attention), rtol=2**-8, atol=0)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_as_in_memory(kind, tmp_path):
    folder = compressed_checkpoint(tmp_path / "source", kind)
    pruner = HeaprPruner.from_pretrained(folder, dequantize=True)
    plan = layout_plan(pruner.model, "variable")
    pruner.apply(plan)
    pruner.save_pretrained(tmp_path / "memory")
    apply_streaming(folder, plan, tmp_path / "stream", dequantize=True)
    assert files_of(tmp_path / "stream") == files_of(tmp_path / "memory")
    assert "quantization" not in (tmp_path / "stream" / "config.json").read_text()
    assert torch.equal(logits_of(load_model(tmp_path / "stream")[0]), logits_of(pruner.model))


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_missing_scales_are_named(kind, tmp_path):
    missing = "model.layers.1.mlp.experts.3.down_proj.weight_scale"
    folder = compressed_checkpoint(tmp_path, kind, leave_out=missing)
    with pytest.raises(HeaprError, match=f"1 of its weights .* no scales .*{missing.removesuffix('_scale')}"):
        load_model(folder, dequantize=True)


@needs_library
@pytest.mark.parametrize(
    "change", [{"strategy": "block"}, {"symmetric": False}, {"type": "int"}, {"actorder": "group"}]
)
def test_what_would_come_out_wrong_is_refused(change, tmp_path):
    folder = compressed_checkpoint(tmp_path, "FP8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    ((key, value),) = change.items()
    with pytest.raises(HeaprError, match=f"compressed-tensors: .*{key}={value!r}.*, which is not dequantized here"):
        load_model(folder, dequantize=True)


@pytest.mark.skipif(is_compressed_tensors_available(), reason="compressed-tensors is here")
def test_without_the_library_it_is_named(tmp_path):
    with pytest.raises(
        HeaprError, match="the package that dequantizes them is not here; pip install compressed-tensors"
    ):
        load_model(compressed_checkpoint(tmp_path, "FP8"), dequantize=True)
