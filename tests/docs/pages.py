# Licensed under the Apache License, Version 2.0
"""The pages of the documentation, and the snippets in them as they run on this machine.

The tables below say what takes the place of what is not here or takes hours; nothing else is changed. A snippet that needs other
software than the package brings names the environment, in a comment just above it: `<!-- needs: vLLM -->`.
"""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import yaml


ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs" / "source").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")])

# Environments that snippets may name, and the script that makes each and runs its snippets.
ENVIRONMENTS = {
    "vLLM": "tests/serving/run_vllm.sh",
    "llama.cpp": "tests/serving/run_llama_cpp.sh",
    "bitsandbytes": "tests/surgery/run_quantizers.sh",
    "llm-compressor": "tests/surgery/run_llm_compressor.sh",
    "exporters": "tests/modeling/run_exporters.sh",
}

# What pages name and this machine does not have, and what is taken in its place: a model by a small one of its family.
SMALL_MODELS = {"small-qwen3_moe": "qwen3_moe", "small-qwen2_moe": "qwen2_moe", "small-deepseek": "deepseek"}
STAND_INS = {
    "Qwen/Qwen3-235B-A22B-FP8": "small-fp8",
    "Qwen/Qwen3-30B-A3B": "small-qwen3_moe",
    "Qwen/Qwen2-57B-A14B": "small-qwen2_moe",
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": "small-qwen2_moe",
    "Qwen/Qwen1.5-MoE-A2.7B": "small-qwen2_moe",
    "deepseek-ai/deepseek-moe-16b-base": "small-deepseek",
    "-m moe-a": "-m small-qwen3_moe",
    "--teacher moe-a": "--teacher small-qwen3_moe",
    "HuggingFaceFW/fineweb[sample-10BT/train]": "demo",
    "Salesforce/wikitext[wikitext-2-raw-v1/train]": "text.jsonl",
    "HuggingFaceH4/ultrachat_200k[train_sft]": "demo",
    "--dataset wikitext2 ptb": "--dataset demo",
    "--dataset wikitext2": "--dataset demo",
    "wikitext2": "demo",  # in recipes
    "align_for: quantization": "width_multiple: 16",  # small experts have no 128
    "./pruned": "demo",
    # The harness's data are on the Hub, and the demo has no chat template.
    "--tasks paper": "--tasks here --include-path tasks-here",
    "--tasks generation --chat-template": "--tasks here --include-path tasks-here",
    "--tasks arc_easy": "--tasks here --include_path tasks-here",
    # Two processes on the CPU, and two hosts that are this one.
    "--num_processes 8": "--num_processes 2",
    "--num_processes 16": "--num_processes 2",
    "10.0.0.1": "127.0.0.1",
}
# Of each of these options a run here takes at most so much, where a page gives it.
AT_MOST = {
    "num_samples": 10,
    "reconstruction_steps": 2,
    "seq_length": 64,
    "max_steps": 2,
    "eval_steps": 2,
    "batch_size": 2,
    "micro_batch_size": 2,
    "prompt_length": 32,
    "new_tokens": 8,
    "windows": 2,
    "points": 2,
}
LIMITED = re.compile(rf"\b({'|'.join(AT_MOST).replace('_', '[-_]')})(=|: | )(\d+)\b")
# What a command gets where the page leaves it to the defaults, which are for large models and for hardware with bfloat16.
SMALLER = {
    "calibrate": {"num_samples": 4, "seq_length": 64, "dtype": "float32"},
    "prune": {"num_samples": 4, "seq_length": 64, "dtype": "float32"},
    "evaluate": {"num_samples": 2, "seq_length": 64, "dtype": "float32"},
    "recover": {
        "dtype": "float32",
        "max_steps": 2,
        "eval_steps": 2,
        "num_samples": 12,
        "seq_length": 64,
        "batch_size": 2,
        "micro_batch_size": 1,
    },
}

SNIPPET = re.compile(
    r"(?:^ *<!-- needs: (?P<environment>[^>]+) -->\s*)?^(?P<indent> *)```(?P<kind>\w*)\n(?P<code>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)
RUN = ("python", "bash", "yaml")
SHOWN = ("text",)  # output


class Snippet(NamedTuple):
    kind: str
    code: str
    environment: str | None


def snippets(page: Path) -> list[Snippet]:
    found = SNIPPET.finditer(page.read_text(encoding="utf-8"))
    return [Snippet(match["kind"], textwrap.dedent(match["code"]), match["environment"]) for match in found]


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def has_to_run(page: Path) -> bool:
    return any(snippet.kind in RUN for snippet in snippets(page))


def _name(option: str) -> str:
    return option.replace("-", "_")


def here(code: str) -> str:
    """Code, a command or a recipe with what is on this machine, and small."""
    for name, stand_in in STAND_INS.items():
        code = code.replace(name, stand_in)
    code = LIMITED.sub(lambda found: f"{found[1]}{found[2]}{min(int(found[3]), AT_MOST[_name(found[1])])}", code)
    return re.sub(r'from_pretrained\("demo"(?!.*dtype)([^()]*)\)', r'from_pretrained("demo"\1, dtype="float32")', code)


def command_here(line: str) -> str:
    """A command as it runs here."""
    [command] = re.findall(r"heapr (\w+)", line)[:1]
    line = here(line)
    given = {_name(flag) for flag in re.findall(r"--([\w-]+)", line)}
    smaller = SMALLER.get(command, {})
    if (
        " -c " in line or " -s " in line
    ):  # they say how large it is, and recipes are run in their dtype in tests/recipes
        smaller = {name: value for name, value in smaller.items() if name == "dtype"}
    for name, value in smaller.items():
        if name not in given:
            line += f" --{name.replace('_', '-')} {value}"
    if command == "calibrate" and " -o " not in line:
        line += " --overwrite"  # of several models there, of one here
    return line


def recipe_here(text: str) -> str:
    """A recipe as it runs here, in the dtype that it names."""
    return yaml.safe_dump(yaml.safe_load(here(text)))
