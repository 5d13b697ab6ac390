# Licensed under the Apache License, Version 2.0
"""What vLLM makes of quantized checkpoints, against transformers and against the checkpoints that they were made from.

    PYTHONPATH=FOLDER/zentorch python benchmarks/serving_quantized.py --text text.jsonl --pairs QUANTIZED=ITS_ORIGINAL ...

in an environment with vLLM (FOLDER, of tests/serving/run_vllm.sh). A quantizer is another environment: `--quantize` of this script there
(tests/surgery/run_llm_compressor.sh) writes the checkpoints, of which pruned ones of variable widths say `experts_as="linear"`.

    python benchmarks/serving_quantized.py --quantize W8A8 --pairs QUANTIZED=ITS_ORIGINAL ...

Prints a table: the loss of the text's tokens in nats, and what log-probabilities are from those of the original in transformers, all in
bfloat16. The texts are given, not generated.
"""

from __future__ import annotations

import argparse
import gc
import shutil
from pathlib import Path

import torch


GROUP = 32
"""Columns that share a scale in 4 bits: attention of small models is no multiple of 128 wide."""


def quantize(original: str, scheme: str, output: str) -> None:
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    import optimum_heapr  # noqa: F401, transformers knows pruned models by it

    chosen = preset_name_to_scheme(scheme, ["Linear"])
    if chosen.weights.num_bits == 4:
        chosen.weights.group_size = GROUP
    model = AutoModelForCausalLM.from_pretrained(original, dtype="bfloat16")
    ignore = ["lm_head", "re:.*mlp.gate$"]
    oneshot(model=model, recipe=QuantizationModifier(config_groups={"group_0": chosen}, ignore=ignore))
    model.save_pretrained(output)
    for file in Path(original).glob("tokenizer*"):
        shutil.copy(file, output)


def row(name: str, where: str, found, full) -> str:
    from serving_precision import compared

    loss = -found.log_probabilities.mean().item()
    if found is full:
        return f"| {name} | {where} | {loss:.4f} | | | |"
    found.routed = full.routed  # kernels for 4 bits choose experts themselves, and this is not about routing
    values = compared(found, full)
    return f"| {name} | {where} | {loss:.4f} | {values['mean']:.4f} | {values['largest']:.2f} | {values['likeliest']:.1f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", required=True, metavar="QUANTIZED=ITS_ORIGINAL")
    parser.add_argument(
        "--quantize", metavar="SCHEME", help="write the quantized ones, by llm-compressor; nothing is measured"
    )
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    pairs = dict(pair.rsplit("=", 1) for pair in args.pairs)
    if args.quantize:
        for quantized, original in pairs.items():
            quantize(original, args.quantize, quantized)
        return

    from serving_precision import in_transformers, in_vllm, windows

    texts, dtype = windows(next(iter(pairs.values())), args.text, args.windows, args.length), torch.bfloat16
    # All of transformers first: once an engine has started, the configurations of pruned models in this process are vLLM's.
    theirs = {}
    for folder in dict.fromkeys([*pairs.values(), *pairs]):
        try:
            theirs[folder] = in_transformers(folder, texts, dtype)
        except (ValueError, RuntimeError) as error:
            theirs[folder] = f"{type(error).__name__}, {str(error).splitlines()[0][:100]}"
    print("| checkpoint | runs in | loss | mean difference | largest | likeliest token the same |")
    print("|---|---|---|---|---|---|")
    done = set()
    for quantized, original in pairs.items():
        full = theirs[original]
        for folder in (original, quantized):
            if folder in done:
                continue
            done.add(folder)
            name, found = Path(folder).name, theirs[folder]
            print(
                f"| {name} | transformers | {found} |"
                if isinstance(found, str)
                else row(name, "transformers", found, full)
            )
            print(row(name, "vLLM", in_vllm(folder, texts, dtype), full), flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
