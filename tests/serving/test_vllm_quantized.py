# Licensed under the Apache License, Version 2.0
"""Quantized experts of variable widths in vLLM: INT8 with a scale for each row, as llm-compressor writes `W8A8`.

Of x86 CPUs vLLM has kernels for those with AMX, and through zentorch for AMD's; `tests/serving/run_vllm.sh` runs this with zentorch.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; tests/serving/run_vllm.sh makes an environment", allow_module_level=True)

from optimum_heapr.serving.errors import ServingError  # noqa: E402
from tests.serving.engine import log_probabilities, served  # noqa: E402
from tests.serving.quantized_models import FORMS, SHAPE  # noqa: E402
from tests.serving.variable_models import padded_checkpoint, variable_checkpoint  # noqa: E402


pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

WRITTEN = os.environ.get("LLM_COMPRESSOR_WROTE")
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*self_attn.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    },
}


def quantized(folder: Path) -> Path:
    """Puts the experts of a checkpoint into INT8."""
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if re.search(r"\.experts\.\d+\.\w+\.weight$", name) and tensor.numel():
            scale = tensor.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
            found[name], found[f"{name}_scale"] = (tensor / scale).round().to(torch.int8), scale
        else:
            found[name] = tensor
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    configure(folder, W8A8)
    return folder


def configure(folder: Path, settings: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


@torch.no_grad()
def median_error(model: torch.nn.Module, folder: Path) -> float:
    """Of log-probabilities, against the model in float32."""
    errors = []
    for ids, values in log_probabilities(served(folder, dtype="bfloat16")):
        scores = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        errors.append((scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] - values).abs())
    gc.collect()
    return torch.cat(errors).median().item()


def needs_kernels() -> None:
    from vllm.platforms import current_platform

    if not (torch.cpu._is_amx_tile_supported() or current_platform.is_zen_cpu()):
        pytest.skip("vLLM has no kernel for quantized experts on this CPU: it takes AMX, or one of AMD and zentorch")


def test_int8_experts_lose_what_stock_ones_do(tmp_path):
    """The stock model of the full width, with zeros where atomic experts were removed, in the same INT8."""
    needs_kernels()
    model = variable_checkpoint(tmp_path / "pruned", "qwen3_moe", **SHAPE)
    padded_checkpoint(tmp_path / "padded", "qwen3_moe", model)
    ours, stock = (median_error(model, quantized(tmp_path / name)) for name in ("pruned", "padded"))
    print(f"\nmedian error of a log-probability: {ours:.4f}, stock {stock:.4f}")
    assert 0 < ours < 1.5 * stock


@pytest.mark.skipif(WRITTEN is None, reason="LLM_COMPRESSOR names no environment of llm-compressor, see run_vllm.sh")
@pytest.mark.parametrize("name", FORMS)
def test_what_llm_compressor_writes_is_served(name):
    needs_kernels()
    # The stock model computes what the pruned one does, and loads where an engine has started.
    model = AutoModelForCausalLM.from_pretrained(Path(WRITTEN) / "padded", dtype=torch.float32).eval()
    found = median_error(model, Path(WRITTEN) / f"{name}-W8A8")
    print(f"\nmedian error of a log-probability, {name}: {found:.4f}")
    assert 0 < found < 0.1


def test_what_other_tools_store_is_not_taken_for_damage(tmp_path):
    """bitsandbytes stores rows of bytes, whose shapes are no widths."""
    variable_checkpoint(tmp_path, "qwen3_moe")
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.view(-1, 1) for name, tensor in load_file(file).items()}, file)
    configure(tmp_path, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ServingError, match=r"a scale for each row \(bitsandbytes\)"):
        served(tmp_path, dtype="bfloat16")


def test_other_schemes_are_refused(tmp_path):
    variable_checkpoint(tmp_path, "qwen3_moe")
    settings = json.loads(json.dumps(W8A8))
    settings["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    configure(tmp_path, settings)
    with pytest.raises(ServingError, match="quantization other than INT8 with a scale for each row") as error:
        served(tmp_path, dtype="bfloat16")
    assert "\n" not in str(error.value)
