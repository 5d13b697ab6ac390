# Licensed under the Apache License, Version 2.0
"""The estimate of what activations take, against the memory that a calibration took: models of several shapes.

    python benchmarks/activations.py

Each shape is a process of its own. Measured is the most resident memory during a calibration of two samples, over what the
process took before, with the model loaded and one short sample calibrated. Prints one Markdown table.
"""

import argparse
import subprocess
import sys
import threading
import time

import torch


COMMON = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192}
SHAPES = {  # name: model type, tokens, dtype, configuration
    "16 experts x 256 of 512": ("qwen3_moe", 1024, "float32", (512, 256, 6, 8192, 16, 4)),
    "32 experts x 128 of 512": ("qwen3_moe", 1024, "float32", (512, 128, 6, 4096, 32, 8)),
    "vocabulary of 65,536": ("qwen3_moe", 1024, "float32", (256, 128, 4, 65536, 8, 2)),
    "4,096 tokens": ("qwen3_moe", 4096, "float32", (256, 128, 6, 2048, 8, 2)),
    "mixtral, 8 x 1024 of 512": ("mixtral", 1024, "float32", (512, 1024, 4, 4096, 8, 2)),
    "gpt-oss, eager attention": ("gpt_oss", 512, "float32", (512, 256, 4, 4096, 16, 4)),
    "16 x 256 of 512, bfloat16": ("qwen3_moe", 1024, "bfloat16", (512, 256, 6, 8192, 16, 4)),
}


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def measure(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from optimum_heapr import HeaprConfig
    from optimum_heapr.calibration.estimate import MemoryEstimate
    from optimum_heapr.calibration.runner import calibrate
    from optimum_heapr.text.samples import CalibrationData

    model_type, tokens, dtype, (hidden, width, layers, vocabulary, experts, top_k) = SHAPES[name]
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers, "head_dim": hidden // 8}
    if model_type == "qwen3_moe":
        sizes |= {"moe_intermediate_size": width, "num_experts": experts}
    else:
        sizes |= {"intermediate_size": width, "num_local_experts": experts}
    if model_type == "gpt_oss":
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    config = AutoConfig.for_model(model_type, num_experts_per_tok=top_k, **COMMON, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    estimate = MemoryEstimate.of(model, HeaprConfig(seq_length=tokens, num_samples=2)).activations
    calibrate(model, CalibrationData([torch.randint(0, vocabulary, (16,))], "random", 0, 16))
    before, most, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    samples = [torch.randint(0, vocabulary, (tokens,)) for _ in range(2)]
    calibrate(model, CalibrationData(samples, "random", 0, tokens))
    done.set()
    watcher.join()
    taken = most[0] - before
    print(f"| {name} | {tokens:,} | {estimate / 1e6:.0f} | {taken / 1e6:.0f} | {estimate / taken:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--shape"]:
        measure(sys.argv[2])
    else:
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
        print("| model | tokens | estimated, MB | measured, MB | ratio |\n|---|---|---|---|---|", flush=True)
        for shape in SHAPES:
            subprocess.run(
                [sys.executable, "-W", "ignore", __file__, "--shape", shape], check=True, stderr=subprocess.DEVNULL
            )
