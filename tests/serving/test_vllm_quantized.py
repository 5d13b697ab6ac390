# Licensed under the Apache License, Version 2.0
"""Quantized experts of variable widths in vLLM: in INT8 with a scale for each row and in INT4 in groups, as llm-compressor writes
`W8A8` and `W4A16`.

Of x86 CPUs vLLM has kernels for those with AMX, and through zentorch for AMD's; `tests/serving/run_vllm.sh` runs this with zentorch.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; tests/serving/run_vllm.sh makes an environment", allow_module_level=True)

from optimum_heapr.serving.errors import ServingError  # noqa: E402
from tests.serving.engine import in_ranks, log_probabilities, served  # noqa: E402
from tests.serving.quantized_models import FORMS, GROUP, SHAPE  # noqa: E402
from tests.serving.variable_models import padded_checkpoint, variable_checkpoint, variable_model  # noqa: E402


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


W4A16 = {
    **W8A8,
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "num_bits": 4, "strategy": "group", "group_size": GROUP, "dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }
    },
}


def in_int8(name: str, tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = tensor.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    numbers = (tensor / scale).round()
    return {name: numbers.to(torch.int8), f"{name}_scale": scale}, numbers * scale


def in_int4(name: str, tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Eight weights in an integer of 32 bits, the first in the lowest four, each with 8 added."""
    rows, columns = tensor.shape
    groups = tensor.view(rows, -1, GROUP)
    scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-8) / 7
    numbers = (groups / scale).round()
    packed = ((numbers.view(rows, -1, 8) + 8).long() << torch.arange(0, 32, 4)).sum(2)
    stored = {
        f"{name}_packed": torch.where(packed >= 2**31, packed - 2**32, packed).int(),
        f"{name}_scale": scale.squeeze(2),
        f"{name}_shape": torch.tensor([rows, columns]),
    }
    return stored, (numbers * scale).view(rows, columns)


SCHEMES = {"W8A8": (W8A8, in_int8, 1), "W4A16": (W4A16, in_int4, GROUP)}
"""Settings, what a weight is stored as and stands for then, and what widths are multiples of."""


def quantized(folder: Path, scheme: str) -> Path:
    """Puts the experts of a checkpoint into INT8 or INT4; what they stand for then is in the folder `rounded` beside it."""
    settings, store, _ = SCHEMES[scheme]
    found, rounded = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored, rounded[name] = {name: tensor}, tensor
        if re.search(r"\.experts\.\d+\.\w+\.weight$", name) and tensor.numel():
            stored, rounded[name] = store(name, tensor)
        found |= stored
    shutil.copytree(folder, folder.parent / "rounded", dirs_exist_ok=True)
    save_file(rounded, folder.parent / "rounded" / "model.safetensors", metadata={"format": "pt"})
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    configure(folder, settings)
    return folder


def configure(folder: Path, settings: dict | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def median_error(model: torch.nn.Module, folder: Path, dtype: str = "bfloat16", **options) -> float:
    """Of log-probabilities, against the model in float32."""
    return median_error_of(model, log_probabilities(served(folder, dtype=dtype, **options)))


@torch.no_grad()
def median_error_of(model: torch.nn.Module, found: list[tuple[list[int], torch.Tensor]]) -> float:
    errors = []
    for ids, values in found:
        scores = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        errors.append((scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] - values).abs())
    gc.collect()
    return torch.cat(errors).median().item()


def needs_kernels(scheme: str) -> None:
    from vllm.platforms import current_platform

    if not (current_platform.is_zen_cpu() or (scheme == "W8A8" and torch.cpu._is_amx_tile_supported())):
        pytest.skip(
            f"vLLM has no kernel for {scheme} here: it takes one of AMD and zentorch, or AMX, which has none in groups of 32"
        )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_experts_lose_what_stock_ones_do(scheme, tmp_path):
    """The stock model of the full width, with zeros where atomic experts were removed, in the same scheme."""
    needs_kernels(scheme)
    model = variable_checkpoint(tmp_path / "pruned", "qwen3_moe", multiple=SCHEMES[scheme][2], **SHAPE)
    padded_checkpoint(tmp_path / "padded", "qwen3_moe", model)
    folders = [quantized(tmp_path / name, scheme) for name in ("pruned", "padded")]
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype=torch.float32).eval()
    ours, stock = (median_error(rounded, folder) for folder in folders)
    unrounded = median_error(model, folders[0])
    print(
        f"\nmedian error of a log-probability: {ours:.4f}, stock {stock:.4f}; with what rounding weights loses {unrounded:.4f}"
    )
    assert 0 < ours < min(1.5 * stock, 0.06)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_ranks_lose_what_one_does(scheme, tmp_path):
    """Each finds the scales of its half of the activations, so that the two are not the same to the last bit."""
    needs_kernels(scheme)
    variable_checkpoint(tmp_path / "pruned", "qwen3_moe", multiple=SCHEMES[scheme][2], **SHAPE)
    folder = quantized(tmp_path / "pruned", scheme)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype=torch.float32).eval()
    [found] = in_ranks([folder], tmp_path, dtype="bfloat16", tensor_parallel_size=2)
    two, one = median_error_of(rounded, found), median_error(rounded, folder)
    print(f"\nmedian error of a log-probability: {two:.4f} on two ranks, {one:.4f} on one")
    assert 0 < two < min(1.5 * one, 0.06)


@pytest.mark.skipif(WRITTEN is None, reason="LLM_COMPRESSOR names no environment of llm-compressor, see run_vllm.sh")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", FORMS)
def test_what_llm_compressor_writes_is_served(name, scheme):
    needs_kernels(scheme)
    # The stock model computes what the pruned one does, and loads where an engine has started.
    model = AutoModelForCausalLM.from_pretrained(Path(WRITTEN) / "padded", dtype=torch.float32).eval()
    found = median_error(model, Path(WRITTEN) / f"{name}-{scheme}")
    print(f"\nmedian error of a log-probability, {name}, {scheme}: {found:.4f}")
    assert 0 < found < {"W8A8": 0.1, "W4A16": 0.6}[scheme]


def test_what_other_tools_store_is_not_taken_for_damage(tmp_path):
    """bitsandbytes stores rows of bytes, whose shapes are no widths."""
    variable_checkpoint(tmp_path, "qwen3_moe")
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.view(-1, 1) for name, tensor in load_file(file).items()}, file)
    configure(tmp_path, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ServingError, match=r"with quantization \(bitsandbytes\) other than INT8"):
        served(tmp_path, dtype="bfloat16")


@pytest.mark.parametrize(
    ("scheme", "dtype", "setting"),
    [("W4A16", "float32", "1"), ("W4A16", "bfloat16", "0"), ("W8A8", "float32", "1")],
)
def test_a_kernel_that_is_not_there_is_said_in_one_line(scheme, dtype, setting, tmp_path, monkeypatch):
    """zentorch's take activations in bfloat16 alone, and vLLM's setting leaves that for four bits aside."""
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's kernels for AMX look at neither")
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", setting)
    variable_checkpoint(tmp_path, "qwen3_moe", multiple=GROUP, **SHAPE)
    quantized(tmp_path, scheme)
    with pytest.raises(ServingError, match=rf"no kernel here for experts in .*torch.{dtype} \(") as error:
        served(tmp_path, dtype=dtype)
    assert "--dtype bfloat16" in str(error.value) and "of AMD with zentorch" in str(error.value)
    assert ("without VLLM_CPU_INT4_W4A8=0" in str(error.value)) == (scheme == "W4A16")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["packed", "scale", "shape"])
def test_packed_experts_of_other_shapes_are_refused(kind, tmp_path):
    needs_kernels("W4A16")
    variable_checkpoint(tmp_path, "qwen3_moe", multiple=GROUP, **SHAPE)
    file = quantized(tmp_path, "W4A16") / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(f"down_proj.weight_{kind}"))
    tensors[name] = tensors[name] + 1 if kind == "shape" else tensors[name][:, :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ServingError, match="the files belong to different models"):
        served(tmp_path, dtype="bfloat16")


def as_int4_without_settings(folder: Path) -> None:
    variable_checkpoint(folder, "qwen3_moe", multiple=GROUP, **SHAPE)
    configure(quantized(folder, "W4A16"), None)


def unquantized_as_int4(folder: Path) -> None:
    variable_checkpoint(folder, "qwen3_moe", multiple=GROUP, **SHAPE)
    configure(folder, W4A16)


def packed_as_int8(folder: Path) -> None:
    """Quantizers that look for linear layers pass over packed experts, and say that all was quantized."""
    variable_model("qwen3_moe", **SHAPE).save_pretrained(folder, save_original_format=False)
    configure(folder, W8A8)


def floats_as_int8(folder: Path) -> None:
    variable_checkpoint(folder, "qwen3_moe", **SHAPE)
    file = quantized(folder, "W8A8") / "model.safetensors"
    floats = {
        name: tensor.float() if tensor.dtype == torch.int8 else tensor for name, tensor in load_file(file).items()
    }
    save_file(floats, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            as_int4_without_settings,
            r"weight_(packed|scale|shape) of torch.\w+, and by config.json experts there are not quantized",
        ),
        (unquantized_as_int4, "weight of torch.float32, and by config.json experts there are in INT4 in groups of 32"),
        (packed_as_int8, "weight of torch.float32, and by config.json experts there are in INT8"),
        (floats_as_int8, "weight of torch.float32, and by config.json experts there are in INT8"),
    ],
)
def test_experts_of_another_scheme_than_the_settings_are_refused(make, said, tmp_path):
    needs_kernels("W4A16")
    make(tmp_path / "pruned")
    with pytest.raises(ServingError, match=said) as error:
        served(tmp_path / "pruned", dtype="bfloat16")
    assert "\n" not in str(error.value)


def test_layers_that_are_left_as_they_are(tmp_path):
    """Experts of some layers are not quantized."""
    needs_kernels("W4A16")
    model = variable_checkpoint(tmp_path / "pruned", "qwen3_moe", multiple=GROUP, **SHAPE)
    plain = load_file(tmp_path / "pruned" / "model.safetensors")
    file = quantized(tmp_path / "pruned", "W4A16") / "model.safetensors"
    left = ".layers.0.mlp.experts."
    tensors = {name: tensor for name, tensor in load_file(file).items() if left not in name}
    save_file(tensors | {name: plain[name] for name in plain if left in name}, file, metadata={"format": "pt"})
    configure(tmp_path / "pruned", {**W4A16, "ignore": [*W4A16["ignore"], "re:.*layers.0.*"]})
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype=torch.float32).eval()
    experts = [found.model.layers[0].mlp.experts for found in (rounded, model)]
    experts[0].load_state_dict(experts[1].state_dict())
    assert 0 < median_error(rounded, tmp_path / "pruned") < 0.06


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 0.06)])
def test_experts_that_are_not_quantized_are_served_beside_zentorch(dtype, most, tmp_path):
    """Whose kernel for them wants several at a time in float32, where of one prompt a piece may have one token: vLLM's own is used."""
    model = variable_checkpoint(tmp_path, "qwen3_moe", **SHAPE)
    found = median_error(model, tmp_path, dtype=dtype, max_num_seqs=1)
    print(f"\nmedian error of a log-probability, {dtype}: {found:.1e}")
    assert found < most


def test_a_layer_without_experts_gives_nothing(tmp_path):
    """Whatever is in the memory that its one piece has, where nothing is stored of it."""
    needs_kernels("W4A16")
    variable_checkpoint(tmp_path / "pruned", "qwen3_moe", multiple=GROUP, **SHAPE)
    folder, empty = quantized(tmp_path / "pruned", "W4A16"), "model.layers.0.mlp.experts"
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(empty)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["expert_widths"][empty] = [0] * len(config["expert_widths"][empty])
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype=torch.float32).eval()
    model.get_submodule(empty).down_proj.data.zero_()
    found = median_error(model, folder)
    print(f"\nmedian error of a log-probability: {found:.4f}")
    assert 0 < found < 0.03
