# Licensed under the Apache License, Version 2.0
"""Puts the linear layers of a small checkpoint into FP8, with a scale for each block, as DeepSeek-V3 and Qwen3-…-FP8 are.

    python benchmarks/in_fp8.py --model MODEL --output MODEL-fp8 --block 128

What it then costs to prune that and to write it in FP8 again is said by the commands of the package, see guides/quantized.md. Weights
are in memory a tensor at a time, but for the file that is written. Nothing here is part of the package.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.quantizers.auto import AutoHfQuantizer

from optimum_heapr.checkpoints.origins import place_of
from optimum_heapr.utils.fp8 import METHOD, quantized


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-m", "--model", required=True, help="folder of a checkpoint of one file, or demo")
    parser.add_argument("-o", "--output", required=True, help="folder, which must not be there")
    parser.add_argument("--block", type=int, default=128, help="rows and columns that share a scale")
    args = parser.parse_args()
    source, output = Path(place_of(args.model)), Path(args.output)
    settings = {"weight_block_size": [args.block, args.block], "activation_scheme": "dynamic", "fmt": "e4m3"}
    settings |= {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    quantizer = AutoHfQuantizer.from_config({**settings, "quant_method": METHOD, "dequantize": True})
    stored = {}
    with safe_open(source / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no dict)
            stored[name] = tensors.get_tensor(name)
            if name.endswith("_proj.weight"):
                stored[name], scales = quantized(quantizer, stored[name].float())
                stored[f"{name}_scale_inv"] = scales.float()
            elif stored[name].is_floating_point():
                stored[name] = stored[name].to(torch.bfloat16)
    shutil.copytree(source, output, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(stored, output / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    changed = {**config, "dtype": "bfloat16", "quantization_config": settings}
    (output / "config.json").write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
