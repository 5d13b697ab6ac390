# Licensed under the Apache License, Version 2.0
"""What quantizers do to pruned experts: bytes before and after, perplexity, and whether what was saved loads again.

    python -m pip install bitsandbytes==0.50.2 torchao==0.18.0
    python benchmarks/after_pruning.py --model MODEL --text text.jsonl --output after_pruning \
        --forms stock=MODEL uniform=U variable=V "linear=V" "linear, width_multiple=32=V32" \
        --python llmcompressor=LLMC/bin/python auto-round=ROUND/bin/python

Each form is a checkpoint; those called `linear…` are of layout `variable`, and are read as if they were written with
`experts_as="linear"`. Each quantizer and form is a process of its own, which loads, quantizes, measures and saves, and one more that
loads what was saved. A library with an environment of its own, made by `python -m pip install llmcompressor==0.14.0.1 -e .` for one,
runs there, by `--python PACKAGE=INTERPRETER`. Prints one table, and writes it as `after_pruning.md`; a row that fails says what the
library said. Nothing here is part of the package.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple


GROUP = 32
"""Columns that share a scale, where a tool lets one choose: attention of small models is no multiple of 128 wide."""

BEHIND = ("torch", "transformers", "compressed-tensors")
HEADER = "| quantizer | checkpoint | bytes of expert weights, saved | in memory | perplexity | saved and loaded |"


def load(folder: str, **options: Any):
    import torch
    from transformers import AutoModelForCausalLM

    import optimum_heapr  # noqa: F401 (pruned models are known by it)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
    for module in model.modules():  # or bitsandbytes has kernels on some CPUs that take few shapes
        module.support_avx512bf16_for_cpu = False
    return model


def by_config(make: Callable[[], Any]) -> Callable:
    """Quantized as it is loaded."""
    return lambda args: load(args.forms[0], quantization_config=make())


def bitsandbytes(**options):
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.bfloat16)


def torchao(name: str, **options):
    import torchao.quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(torchao.quantization, name)(**options))


def quanto():
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def hqq():
    from transformers import HqqConfig

    return HqqConfig(nbits=4, group_size=64)


def llm_compressor(scheme: str, group_size: int | None = None) -> Callable:
    def quantize(args):
        from compressed_tensors.quantization import preset_name_to_scheme
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier

        chosen = preset_name_to_scheme(scheme, ["Linear"])
        if group_size:
            chosen.weights.group_size = group_size
        ignore = ["lm_head", "re:.*mlp.gate$"]
        model = load(args.forms[0])
        oneshot(model=model, recipe=QuantizationModifier(config_groups={"group_0": chosen}, ignore=ignore))
        return model

    return quantize


def auto_round(args):
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    model, tokenizer = load(args.forms[0]), AutoTokenizer.from_pretrained(args.model)
    rows = [json.loads(line)["text"] for line in Path(args.text).read_text(encoding="utf-8").splitlines()]
    rounded = AutoRound(
        model, tokenizer, scheme="W4A16", group_size=GROUP, iters=0, dataset=rows[:64], seqlen=args.seq_length
    )
    return rounded.quantize_and_save(args.output, format="auto_round")[0]


class Tool(NamedTuple):
    package: str | None
    quantize: Callable
    saves: bool = False


TOOLS = {
    "none": Tool(None, lambda args: load(args.forms[0])),
    "bitsandbytes, NF4": Tool(
        "bitsandbytes", by_config(lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    ),
    "bitsandbytes, int8": Tool("bitsandbytes", by_config(lambda: bitsandbytes(load_in_8bit=True))),
    "torchao, int8 weights": Tool("torchao", by_config(lambda: torchao("Int8WeightOnlyConfig"))),
    "torchao, int4 weights": Tool("torchao", by_config(lambda: torchao("Int4WeightOnlyConfig", group_size=GROUP))),
    "llm-compressor, FP8_DYNAMIC": Tool("llmcompressor", llm_compressor("FP8_DYNAMIC")),
    "llm-compressor, W4A16": Tool("llmcompressor", llm_compressor("W4A16", GROUP)),
    "auto-round, W4A16": Tool("auto-round", auto_round, saves=True),
    "quanto, int8 weights": Tool("optimum-quanto", by_config(quanto)),
    "HQQ, 4 bits": Tool("hqq", by_config(hqq)),
}


def saved_bytes(folder: str) -> int:
    """Of the experts' tensors in the files of a checkpoint, with what belongs to them."""
    from safetensors import safe_open

    total = 0
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                if ".experts." in name:
                    tensor = tensors.get_tensor(name)
                    total += tensor.numel() * tensor.element_size()
    return total


def measured(model, args) -> dict:
    """Perplexity of the text, and then the bytes of experts by type."""
    from transformers import AutoTokenizer

    from optimum_heapr.evaluation.perplexity import evaluate_perplexity
    from optimum_heapr.evaluation.storage import StoredWeights

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    perplexity = evaluate_perplexity(model, tokenizer, args.text, args.seq_length, args.windows)["perplexity"]
    return {"experts": StoredWeights.of(model).experts, "perplexity": perplexity}


def one(args) -> None:
    """A quantizer and a checkpoint; or, if `--tool` is `reload`, a checkpoint as it was saved."""
    if args.tool == "versions":
        print(json.dumps({name: version(name) for name in args.forms if is_installed(name)}))
        return
    tool = TOOLS["none" if args.tool == "reload" else args.tool]
    model = tool.quantize(args)
    if not tool.saves or args.tool == "reload":
        print(json.dumps(measured(model, args)), flush=True)
        if args.output:
            model.save_pretrained(args.output)


def is_installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec({"optimum-quanto": "optimum.quanto"}.get(name, name.replace("-", "_"))) is not None


def run(args, tool: str, folder: str, output: str = "", package: str | None = None) -> tuple[dict | None, str]:
    """What was measured in a process of its own, if it came so far, and what it ended with."""
    interpreter = args.python.get(package, sys.executable)
    command = [interpreter, __file__, "--tool", tool, "--model", args.model, "--text", args.text, "--forms", folder]
    command += [f"--windows={args.windows}", f"--seq-length={args.seq_length}", "--output", output]
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    reason = ""
    if done.returncode:
        said = re.findall(
            r"^\s*(\w*Error: .+)", done.stderr, re.MULTILINE
        )  # of those that follow each other the cause
        reason = said[0][:160] if said else f"the process ends with {done.returncode}"
    return (json.loads(lines[0]) if lines else None), reason.replace("|", "\\|")


def row(args, name: str, form: str, folder: str, before: dict) -> str:
    tool = TOOLS[name]
    with tempfile.TemporaryDirectory() as saved:
        after, reason = run(args, name, folder, saved, tool.package)
        if reason and after is None:
            return f"| {name} | {form} | fails: {reason} | | | |"
        was = sum(before["experts"].values())
        if reason:
            memory, perplexity = after["experts"], f"{before['perplexity']:.2f} → {after['perplexity']:.2f}"
            return f"| {name} | {form} | | {types(memory)} | {perplexity} | not saved: {reason} |"
        saved = str(next(Path(saved).rglob("config.json")).parent)  # auto-round makes a folder of its own in it
        again, reason = run(args, "reload", saved, "", tool.package)
        sizes = f"{was:,} → {saved_bytes(saved):,}"
        at_once = f"{before['perplexity']:.2f}" + (f" → {after['perplexity']:.2f}" if after else "")
        if again is None:
            return f"| {name} | {form} | {sizes} | | {at_once} | not loaded: {reason} |"
        return f"| {name} | {form} | {sizes} | {types(again['experts'])} | {at_once} | {again['perplexity']:.2f} |"


def types(experts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {size:,}" for kind, size in sorted(experts.items(), key=lambda item: -item[1]))


def as_linear(folder: str, into: Path) -> str:
    """The checkpoint as `experts_as="linear"` writes it: the same files, and an entry of the configuration."""
    into.mkdir()
    for file in Path(folder).resolve().iterdir():
        if file.name != "config.json":
            (into / file.name).symlink_to(file)
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    (into / "config.json").write_text(json.dumps({**config, "experts_as": "linear"}), encoding="utf-8")
    return str(into)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="unpruned model; its tokenizer is used for all")
    parser.add_argument("--text", required=True, help="text whose perplexity is measured")
    parser.add_argument("--forms", nargs="+", required=True, metavar="NAME=FOLDER", help="checkpoints")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS)[1:], metavar="TOOL")
    parser.add_argument("--python", nargs="+", default=[], metavar="PACKAGE=INTERPRETER", help="of other environments")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--output", default="after_pruning", help="name of the table, without .md")
    parser.add_argument("--tool", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tool:
        return one(args)
    args.python = dict(pair.split("=", 1) for pair in args.python)
    lines = []
    for package in dict.fromkeys(TOOLS[tool].package for tool in args.tools):
        command = [
            args.python.get(package, sys.executable),
            __file__,
            "--tool",
            "versions",
            "--model",
            "",
            "--text",
            "",
        ]
        found = subprocess.run([*command, "--forms", package, *BEHIND], capture_output=True, text=True, check=True)
        lines.append("- " + ", ".join(" ".join(pair) for pair in json.loads(found.stdout).items()))
    lines += ["", HEADER, "|---|---|---|---|---|---|"]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        forms = dict(form.rsplit("=", 1) for form in args.forms)
        for number, form in enumerate(forms):
            if form.startswith("linear"):
                forms[form] = as_linear(forms[form], Path(folder) / str(number))
        before = {}
        for form, checkpoint in forms.items():
            before[form], reason = run(args, "none", checkpoint)
            if before[form] is None:
                raise SystemExit(f"{checkpoint}: {reason}")
        for tool in args.tools:
            for form, checkpoint in forms.items():
                lines.append(row(args, tool, form, checkpoint, before[form]))
                print(lines[-1], flush=True)
                Path(f"{args.output}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
