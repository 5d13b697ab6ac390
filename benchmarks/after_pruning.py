# Licensed under the Apache License, Version 2.0
"""What quantizers and adapters do to pruned experts: bytes, perplexity, what is said, and whether what was saved loads again.

    python -m pip install bitsandbytes==0.50.2 torchao==0.18.0 peft==0.21.2
    python benchmarks/after_pruning.py --model MODEL --text text.jsonl --output after_pruning \
        --forms stock=MODEL uniform=U variable=V "linear=V" "linear, width_multiple=32=V32" \
        --python llmcompressor=LLMC/bin/python auto-round=ROUND/bin/python

Each form is a checkpoint; those called `linear…` are of layout `variable`, and are read as if they were written with
`experts_as="linear"`. Each tool and form is a process of its own, which loads, quantizes or adapts, measures and saves, and one more that
loads what was saved; both are forked from one that has imported the libraries. A library with an environment of its own, made by `python -m pip install llmcompressor==0.14.0.1 -e .` for one,
runs there, by `--python PACKAGE=INTERPRETER`. Prints two tables, and writes them as `after_pruning.md`; a row that fails says what the
library said. What was measured is kept in `after_pruning.json`, and not measured again. Nothing here is part of the package.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple


GROUP = 32
"""Columns that share a scale, where a tool lets one choose: attention of small models is no multiple of 128 wide."""

BEHIND = ("torch", "transformers", "compressed-tensors")
HEADER = "| quantizer | checkpoint | bytes of expert weights, saved | in memory | perplexity | saved and loaded | the model warns |"
ADAPTED = "| adapters on | checkpoint | updates of experts | trained in experts | perplexity | saved and loaded | merged, loaded | the model warns |"
RANK = 4
WARNING = r"UserWarning: (?:quantized by|adapters) .*"


def load(folder: str, dtype: str = "bfloat16", **options: Any):
    from transformers import AutoModelForCausalLM

    import optimum_heapr  # noqa: F401 (pruned models are known by it)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
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
    "llm-compressor, W8A8": Tool("llmcompressor", llm_compressor("W8A8")),
    "llm-compressor, W4A16": Tool("llmcompressor", llm_compressor("W4A16", GROUP)),
    "auto-round, W4A16": Tool("auto-round", auto_round, saves=True),
    "quanto, int8 weights": Tool("optimum-quanto", by_config(quanto)),
    "HQQ, 4 bits": Tool("hqq", by_config(hqq)),
}


EXPERTS = ["gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "`all-linear`": {"target_modules": "all-linear"},
    "`gate_proj`, `up_proj`, `down_proj`": {"target_modules": [*EXPERTS, "q_proj"]},
    "`target_parameters`": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "`all-linear`, in NF4": {"target_modules": "all-linear"},
}


def adapt(args) -> dict:
    """An adapter whose updates are random, saved by itself and merged, and in 4 bits the model that it is for; all in float32."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    from optimum_heapr.modeling.linear_experts import LinearExperts
    from optimum_heapr.surgery.linear import from_linear_experts

    folder, form = Path(args.output), args.forms[0]
    if args.tool.endswith("NF4"):
        load(form, "float32", quantization_config=bitsandbytes(load_in_4bit=True)).save_pretrained(folder / "base")
        form = str(folder / "base")
        model = prepare_model_for_kbit_training(load(form, "float32"))
    else:
        model = load(form, "float32")
    adapted = get_peft_model(model, LoraConfig(r=RANK, **ADAPTERS[args.tool])).eval()
    torch.manual_seed(0)
    reached = [module for path, module in adapted.named_modules() if ".experts" in path and hasattr(module, "lora_A")]
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    found = {
        "updates": sum(
            getattr(module, "num_experts", 1)
            for module in reached
            if all(one["default"].weight.numel() for one in (module.lora_A, module.lora_B))
        ),
        "trained": sum(
            parameter.numel()
            for name, parameter in adapted.named_parameters()
            if ".experts" in name and "lora_" in name
        ),
        "perplexity": measured(adapted.get_base_model(), args)["perplexity"],
    }
    adapted.save_pretrained(folder / "adapter")
    if args.tool.endswith("NF4"):
        adapted = PeftModel.from_pretrained(load(form, "float32").dequantize(), folder / "adapter")
    merged = adapted.merge_and_unload()
    if any(isinstance(module, LinearExperts) for module in merged.modules()):
        merged = from_linear_experts(merged)
    merged.save_pretrained(folder / "merged")
    return found


def reload_adapter(args) -> dict:
    from peft import PeftModel

    folder = Path(args.output)
    base = folder / "base" if (folder / "base").exists() else args.forms[0]
    alone = measured(
        PeftModel.from_pretrained(load(str(base), "float32"), folder / "adapter").get_base_model().eval(), args
    )
    return alone | {"merged": measured(load(str(folder / "merged"), "float32"), args)["perplexity"]}


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
    """A quantizer or adapter and a checkpoint; or, if `--tool` is `reload…`, what was saved."""
    if args.tool in ADAPTERS or args.tool == "reload adapter":
        print(json.dumps((adapt if args.tool in ADAPTERS else reload_adapter)(args)), flush=True)
        return
    tool = TOOLS["none" if args.tool == "reload" else args.tool]
    model = tool.quantize(args)
    if not tool.saves or args.tool == "reload":
        print(json.dumps(measured(model, args)), flush=True)
        if args.output:
            model.save_pretrained(args.output)


def run(args, tool: str, folder: str, output: str = "") -> tuple[dict | None, str, bool]:
    """What was measured in a process of its own, if it came so far, what it ended with, and whether the model warned of experts."""
    # What all processes need is imported before they are forked.
    import optimum_heapr.evaluation.perplexity  # noqa: F401
    import optimum_heapr.modeling.modeling_heapr  # noqa: F401

    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
        process = os.fork()
        if process == 0:
            os.dup2(printed.fileno(), 1), os.dup2(said.fileno(), 2)
            status = 1
            try:
                one(argparse.Namespace(**{**vars(args), "tool": tool, "forms": [folder], "output": output}))
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        lines, errors = ((file.seek(0), file.read())[1] for file in (printed, said))
    lines = [line for line in lines.splitlines() if line.startswith("{")]
    reason = ""
    if status:
        found = re.findall(
            r"^(?:[\w.]*\.)?(\w*Error\b.*)", errors, re.MULTILINE
        )  # of those that follow each other the cause
        reason = found[0][:160] if found else f"the process ends with {status}"
    return (json.loads(lines[0]) if lines else None), reason.replace("|", "\\|"), bool(re.search(WARNING, errors))


def row(args, name: str, form: str, folder: str, before: dict) -> str:
    with tempfile.TemporaryDirectory() as saved:
        after, reason, warned = run(args, name, folder, saved)
        if reason and after is None:
            return f"| {name} | {form} | fails: {reason} | | | | |"
        was = sum(before["experts"].values())
        at_once = f"{before['perplexity']:.2f}" + (f" → {after['perplexity']:.2f}" if after else "")
        if reason:
            return (
                f"| {name} | {form} | | {types(after['experts'])} | {at_once} | not saved: {reason} | {when(warned)} |"
            )
        saved = str(next(Path(saved).rglob("config.json")).parent)  # auto-round makes a folder of its own in it
        again, reason, later = run(args, "reload", saved)
        sizes = f"{was:,} → {saved_bytes(saved):,}"
        if again is None:
            return f"| {name} | {form} | {sizes} | | {at_once} | not loaded: {reason} | {when(warned, later)} |"
        memory = types(again["experts"])
        return (
            f"| {name} | {form} | {sizes} | {memory} | {at_once} | {again['perplexity']:.2f} | {when(warned, later)} |"
        )


def adapted_row(args, name: str, form: str, folder: str, before: dict) -> str:
    with tempfile.TemporaryDirectory() as saved:
        after, reason, warned = run(args, name, folder, saved)
        if reason:
            return f"| {name} | {form} | fails: {reason} | | | | | {when(warned)} |"
        again, reason, later = run(args, "reload adapter", folder, saved)
        loaded = f"{again['perplexity']:.2f} | {again['merged']:.2f}" if again else f"not loaded: {reason} |"
        figures = f"{after['updates']} | {after['trained']:,} | {before['perplexity']:.2f} → {after['perplexity']:.2f}"
        return f"| {name} | {form} | {figures} | {loaded} | {when(warned, later)} |"


def when(at_once: bool, later: bool = False) -> str:
    """At which of its two steps the model said that experts were not reached."""
    return "at once" if at_once else "when loaded" if later else "–"


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
    everything = [*list(TOOLS)[1:], *ADAPTERS]
    parser.add_argument("--tools", nargs="+", choices=everything, default=everything, metavar="TOOL")
    parser.add_argument("--python", nargs="+", default=[], metavar="PACKAGE=INTERPRETER", help="of other environments")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--output", default="after_pruning", help="name of the table, without .md")
    args = parser.parse_args()
    args.python = dict(pair.split("=", 1) for pair in args.python)
    with tempfile.TemporaryDirectory() as folder:
        forms = dict(form.rsplit("=", 1) for form in args.forms)
        for number, form in enumerate(forms):
            if form.startswith("linear"):
                forms[form] = as_linear(forms[form], Path(folder) / str(number))
        measure(args, forms)


def measure(args, forms: dict[str, str]) -> None:
    """Measures what was not measured before, and writes the tables."""
    kept = Path(f"{args.output}.json")
    packages = {tool: TOOLS[tool].package if tool in TOOLS else "peft" for tool in args.tools}
    rows = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    here = [tool for tool in args.tools if packages[tool] not in args.python]
    for package in dict.fromkeys(packages[tool] for tool in here):
        found = {name: version(name) for name in (package, *BEHIND) if is_installed(name)}
        rows[f"versions, {package}"] = "- " + ", ".join(" ".join(pair) for pair in found.items())
    for form, checkpoint in forms.items():
        if f"none, {form}" not in rows:
            rows[f"none, {form}"], reason, _ = run(args, "none", checkpoint)
            if reason:
                raise SystemExit(f"{checkpoint}: {reason}")
    for tool in here:
        for form, checkpoint in forms.items():
            if f"{tool}, {form}" not in rows:
                one_row = adapted_row if tool in ADAPTERS else row
                rows[f"{tool}, {form}"] = one_row(args, tool, form, checkpoint, rows[f"none, {form}"])
                print(rows[f"{tool}, {form}"], flush=True)
            kept.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for package in dict.fromkeys(packages.values()):
        if package in args.python:  # this program again, there
            command = [
                args.python[package],
                __file__,
                "--model",
                args.model,
                "--text",
                args.text,
                "--output",
                args.output,
            ]
            command += ["--windows", str(args.windows), "--seq-length", str(args.seq_length), "--forms", *args.forms]
            command += ["--tools", *(tool for tool in args.tools if packages[tool] == package)]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
            subprocess.run(command, env=environment, check=True)
    rows = json.loads(kept.read_text(encoding="utf-8"))
    written = [rows[f"versions, {package}"] for package in dict.fromkeys(packages.values())]
    for header, some in ((HEADER, TOOLS), (ADAPTED, ADAPTERS)):
        written += ["", header, "|---" * (header.count("|") - 1) + "|"]
        written += [rows[f"{tool}, {form}"] for tool in args.tools if tool in some for form in forms]
    Path(f"{args.output}.md").write_text("\n".join(written) + "\n", encoding="utf-8")


def is_installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
