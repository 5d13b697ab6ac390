# Licensed under the Apache License, Version 2.0
"""Time to load a pruned checkpoint against the unpruned one, per byte; both storage forms, all in one run.

    python benchmarks/loading.py

Random weights. Loads take turns and the fastest of each counts, so that the file cache is warm for all alike.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.cli.tables import table
from optimum_heapr.text.samples import CalibrationData


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


def seconds_to_load(folder: Path) -> float:
    gc.collect()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for parameter in model.parameters():  # memory-mapped weights are only read when they are looked at
        parameter.detach().view(-1)[:: 4096 // parameter.element_size()].float().sum()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=args.hidden // 8,
        num_experts=args.experts,
        num_experts_per_tok=8,
        moe_intermediate_size=args.width,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as root:
        folders = {name: Path(root) / name for name in ("unpruned", "pruned", "pruned, packed")}
        model.save_pretrained(folders["unpruned"])
        pruner = HeaprPruner(model, config=HeaprConfig(ratio=args.ratio))
        ids = list(torch.randint(0, 1024, (4, 256)))
        pruner.statistics = calibrate(model, CalibrationData(ids, "random", 0, 256))
        pruner.prune()
        pruner.save_pretrained(folders["pruned"])
        pruner.save_pretrained(folders["pruned, packed"], save_original_format=False)
        del model, pruner
        times = {name: [] for name in folders}
        for _ in range(args.repeats):
            for name, folder in folders.items():
                times[name].append(seconds_to_load(folder))
        per_byte = {name: min(values) / size_of(folders[name]) for name, values in times.items()}
        rows = [
            [
                name,
                f"{size_of(folder) / 2**20:.0f}",
                f"{min(times[name]):.2f}",
                f"{per_byte[name] / per_byte['unpruned']:.2f}",
            ]
            for name, folder in folders.items()
        ]
    print(table(["checkpoint", "MiB", "seconds", "seconds a byte, unpruned = 1"], rows))


if __name__ == "__main__":
    main()
