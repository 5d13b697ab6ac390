# Licensed under the Apache License, Version 2.0
"""What quantizers do to pruned experts: bytes before and after, perplexity, and whether what was saved loads again.

    python -m pip install bitsandbytes==0.50.2 torchao==0.18.0
    python benchmarks/after_pruning.py --model MODEL --text text.jsonl --forms stock=MODEL uniform=U variable=V --output after_pruning

Each form is a checkpoint; `linear` is that named `variable`, loaded with `experts_as="linear"`. Each quantizer and form is a process
of its own, which loads, quantizes, measures and saves, and one more that loads what was saved. Prints one table, and writes it as
`after_pruning.md`; a row that fails says what the library said. Nothing here is part of the package.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path


def bitsandbytes(**options):
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.bfloat16)


def torchao(name: str, **options):
    import torchao.quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(torchao.quantization, name)(**options))


TOOLS = {
    "none": ("transformers", lambda: None),
    "bitsandbytes, NF4": ("bitsandbytes", lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "bitsandbytes, int8": ("bitsandbytes", lambda: bitsandbytes(load_in_8bit=True)),
    "torchao, int8 weights": ("torchao", lambda: torchao("Int8WeightOnlyConfig")),
}


def measured(model, tokenizer, args) -> dict:
    """Bytes of experts by type, and the perplexity of the text."""
    from optimum_heapr.evaluation.perplexity import evaluate_perplexity
    from optimum_heapr.evaluation.storage import StoredWeights

    perplexity = evaluate_perplexity(model, tokenizer, args.text, args.seq_length, args.windows)["perplexity"]
    return {"experts": StoredWeights.of(model).experts, "perplexity": perplexity}


def one(args) -> None:
    """A quantizer and a checkpoint; or, if `--tool` is `reload`, a checkpoint as it was saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import optimum_heapr  # noqa: F401 (pruned models are known by it)

    folder = args.forms[0]
    options = {"dtype": torch.bfloat16}
    if args.tool != "reload":
        if args.linear:
            options["experts_as"] = "linear"
        if (config := TOOLS[args.tool][1]()) is not None:
            options["quantization_config"] = config
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    print(json.dumps(measured(model, tokenizer, args)), flush=True)
    if args.output:
        model.save_pretrained(args.output)


def run(args, tool: str, folder: str, linear: bool = False, output: str = "") -> tuple[dict | None, str]:
    """What was measured in a process of its own, if it came so far, and what it ended with."""
    command = [sys.executable, __file__, "--tool", tool, "--model", args.model, "--text", args.text, "--forms", folder]
    command += [f"--windows={args.windows}", f"--seq-length={args.seq_length}", *(["--linear"] if linear else [])]
    done = subprocess.run([*command, "--output", output], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    reason = done.stderr.strip().splitlines()[-1][:160] if done.returncode and done.stderr.strip() else ""
    return (json.loads(lines[0]) if lines else None), reason or ("killed" if done.returncode else "")


def row(args, tool: str, form: str, folder: str, before: dict) -> str:
    with tempfile.TemporaryDirectory() as saved:
        linear = form == "linear"
        after, reason = run(args, tool, folder, linear, saved)
        if after is None:
            return f"| {tool} | {form} | fails: {reason} | | |"
        kinds = ", ".join(f"{kind} {size:,}" for kind, size in sorted(after["experts"].items()))
        sizes = f"{sum(before['experts'].values()):,} → {sum(after['experts'].values()):,} ({kinds})"
        perplexity = f"{before['perplexity']:.2f} → {after['perplexity']:.2f}"
        if reason:
            return f"| {tool} | {form} | {sizes} | {perplexity} | not saved: {reason} |"
        again, reason = run(args, "reload", saved)
        if again is None:
            return f"| {tool} | {form} | {sizes} | {perplexity} | not loaded: {reason} |"
        same = sum(again["experts"].values()) == sum(after["experts"].values())
        return f"| {tool} | {form} | {sizes} | {perplexity} | {again['perplexity']:.2f}{'' if same else ', other bytes'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="unpruned model; its tokenizer is used for all")
    parser.add_argument("--text", required=True, help="text whose perplexity is measured")
    parser.add_argument("--forms", nargs="+", required=True, metavar="NAME=FOLDER", help="checkpoints")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), metavar="TOOL")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--output", default="after_pruning", help="name of the table, without .md")
    parser.add_argument("--tool", help=argparse.SUPPRESS)
    parser.add_argument("--linear", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tool:
        return one(args)
    forms = dict(form.split("=", 1) for form in args.forms)
    if "variable" in forms:
        forms["linear"] = forms["variable"]
    names = {TOOLS[tool][0] for tool in args.tools} | {"torch", "transformers"}
    lines = [
        ", ".join(f"{name} {version(name)}" for name in sorted(names)),
        "",
        "| quantizer | checkpoint | bytes of expert weights | perplexity | saved and loaded |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    before = {}
    for form, folder in forms.items():
        before[form], reason = run(args, "none", folder, form == "linear")
        if before[form] is None:
            raise SystemExit(f"{folder}: {reason}")
    for tool in args.tools:
        for form, folder in forms.items():
            lines.append(row(args, tool, form, folder, before[form]))
            print(lines[-1], flush=True)
            Path(f"{args.output}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
