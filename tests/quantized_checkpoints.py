# Licensed under the Apache License, Version 2.0
"""Checkpoints in FP8 and MXFP4, as those on the Hub are made, and what their numbers stand for, by formulas of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.surgery.stock_models import wide_model


BLOCK = 16
"""Rows and columns of an FP8 block here; 128 in published checkpoints."""

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]], quantization: dict) -> None:
    """Puts other tensors in the place of each tensor of a checkpoint, and into its configuration how it is quantized."""
    weight_map = {}
    for path in folder.glob("*.safetensors"):
        tensors = {}
        for name, tensor in load_file(path).items():
            tensors.update(change(name, tensor))
        save_file(tensors, path, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def fp8_checkpoint(folder: Path, model_type: str = "qwen3_moe", skip: str = "lm_head", **changes) -> Path:
    """The wide model of a family, [`in_fp8`]."""
    wide_model(model_type, **changes).to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    return in_fp8(folder, skip=skip)


def in_fp8(folder: Path, block: int = BLOCK, skip: str = "lm_head") -> Path:
    """Puts linear layers of a checkpoint into FP8, with a scale for each block, of which the last of a row or column may be cut
    off; but those in whose name `skip` stands."""

    def quantize(name, tensor):
        if "_proj" not in name or not name.endswith("weight") or skip in name:
            return {name: tensor}
        rows, columns = tensor.shape
        padded = torch.zeros(-(-rows // block) * block, -(-columns // block) * block)
        padded[:rows, :columns] = tensor
        scale = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block)).abs().amax((1, 3)) / 448
        weight = (tensor.float() / spread(scale, tensor.shape, block)).to(torch.float8_e4m3fn)
        return {name: weight, f"{name}_scale_inv": scale}

    rewrite(folder, quantize, fp8_settings(block, skip))
    return folder


def fp8_settings(block: int = BLOCK, skip: str = "lm_head") -> dict:
    """What the configuration of such a checkpoint says."""
    sizes = {"weight_block_size": [block, block], "activation_scheme": "dynamic", "fmt": "e4m3"}
    return {"quant_method": "fp8", "modules_to_not_convert": [skip], **sizes}


def mxfp4_checkpoint(folder: Path) -> Path:
    """Experts of gpt_oss in 4 bits, with one exponent for 32 of them."""
    generator = torch.Generator().manual_seed(0)

    def quantize(name, tensor):
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor}
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(122, 126, shape, dtype=torch.uint8, generator=generator)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    wide_model("gpt_oss").to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    rewrite(folder, quantize, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint stores."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def spread(scale: torch.Tensor, shape: tuple[int, ...], block: int = BLOCK) -> torch.Tensor:
    """The scale of each weight."""
    return scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: shape[0], : shape[1]]


def dequantized(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What an FP8 weight stands for, in float32; another as it is."""
    scale, weight = stored.get(f"{name}_scale_inv"), stored[name]
    return weight.float() * (1 if scale is None else spread(scale.float(), weight.shape))


def unpacked(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What an MXFP4 weight stands for, [experts, outputs, inputs] in float32."""
    packed, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
    values = torch.tensor(FP4)[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]
    return (values * 2.0 ** (scales.float() - 127).unsqueeze(-1)).flatten(-2)


def compressed_checkpoint(folder: Path, kind: str, leave_out: str = "nothing") -> Path:
    """A checkpoint as llm-compressor writes it: `FP8`, with a scale for each row, or `W4A16`, eight numbers of four bits in 32, with a
    scale for each [`BLOCK`] of a row; tensors of the name `leave_out` are missing."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    if kind == "W4A16":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": BLOCK}

    def quantize(name, tensor):
        if "_proj" not in name:
            return {name: tensor}
        module, groups = name.removesuffix("weight"), tensor.float().unflatten(1, (-1, BLOCK))
        if kind == "FP8":
            scale = (tensor.float().abs().amax(1, keepdim=True) / 448).bfloat16()
            stored = {"weight": (tensor.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
        else:
            scale = (groups.abs().amax(2) / 7).bfloat16()
            numbers = (groups / scale.unsqueeze(2)).round().clamp(-8, 7).flatten(1).long() + 8
            packed = (numbers.unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(2).to(torch.int32)
            stored = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(tensor.shape)}
        return {f"{module}{part}": value for part, value in stored.items() if f"{module}{part}" != leave_out}

    wide_model("qwen3_moe").to(torch.bfloat16).save_pretrained(folder)
    form = "float-quantized" if kind == "FP8" else "pack-quantized"
    group = {"targets": ["Linear"], "format": form, "weights": weights}
    settings = {"format": form, "quantization_status": "compressed", "ignore": ["lm_head"]}
    rewrite(folder, quantize, {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **settings})
    return folder


def decompressed(stored: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """What the weight of a layer in such a checkpoint stands for, in float32."""
    scale = stored[f"{module}.weight_scale"].float()
    if f"{module}.weight" in stored:
        return stored[f"{module}.weight"].float() * scale
    numbers = (stored[f"{module}.weight_packed"].long().unsqueeze(2) >> torch.arange(0, 32, 4)) & 15
    return (numbers.flatten(1) - 8) * scale.repeat_interleave(BLOCK, 1)
