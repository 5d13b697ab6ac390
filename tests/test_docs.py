# Licensed under the Apache License, Version 2.0
"""Documentation is run: every Python and command-line snippet, and every link inside the project.

The snippets of one page share a folder and a namespace and run in the order of the page, as a reader would. What is on the Hub or
takes hours is replaced by the two tables below, and nothing else is. A snippet that needs what is not here says so in a comment just
above it: `<!-- not run: reason -->`.
"""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from optimum_heapr.configuration import HeaprConfig
from optimum_heapr.demo import demo_texts


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs" / "source").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")])
SNIPPET = re.compile(
    r"(?P<skip><!-- not run: [^>]+ -->\s*)?^```(?P<kind>\w+)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)


# What pages name and this machine does not have, and what is taken in its place.
STAND_INS = {
    "Qwen/Qwen3-30B-A3B": "demo",
    "Qwen/Qwen2-57B-A14B": "demo",
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": "demo",
    "deepseek-ai/deepseek-moe-16b-base": "demo",
    "-m moe-a": "-m demo",
    "--teacher moe-a": "--teacher demo",
    "HuggingFaceFW/fineweb[sample-10BT/train]": "demo",
    "Salesforce/wikitext[wikitext-2-raw-v1/train]": "text.jsonl",
    "HuggingFaceH4/ultrachat_200k[train_sft]": "demo",
    "--dataset wikitext2 ptb": "--dataset demo",
    "--dataset wikitext2": "--dataset demo",
    "wikitext2": "demo",  # in recipes
    "./pruned": "demo",
}
# Of each of these options a run here takes at most so much.
AT_MOST = {
    "num_samples": 12,
    "seq_length": 64,
    "max_steps": 2,
    "eval_steps": 2,
    "batch_size": 2,
    "micro_batch_size": 1,
}
SMALLER = {
    "calibrate": "--num-samples 4 --seq-length 64",
    "evaluate": "--num-samples 2 --seq-length 64",
    "recover": "--max-steps 2 --eval-steps 2 --num-samples 12 --seq-length 64 --batch-size 2 --micro-batch-size 1",
}


def here(code: str) -> str:
    """A command or a recipe as it runs here."""
    for name, stand_in in STAND_INS.items():
        code = code.replace(name, stand_in)
    return code


def command_here(line: str) -> str:
    """A command as it runs here; where a stand-in is taken, or many steps would be, smaller."""
    command = line.split()[2]
    replaced = here(line)
    if (replaced != line or command == "recover") and command in SMALLER and " -c " not in line:
        given = set(re.findall(r"--[\w-]+", line))
        pairs = re.findall(r"(--[\w-]+) (\S+)", SMALLER[command])
        replaced += "".join(f" {flag} {value}" for flag, value in pairs if flag not in given)
        replaced += " --overwrite" if command == "calibrate" else ""  # of several models there, of one here
    return replaced


def recipe_here(text: str) -> str:
    """A recipe as it runs here, in the dtype that it names."""
    values = {**yaml.safe_load(here(text))}
    values |= {name: min(values[name], most) for name, most in AT_MOST.items() if name in values}
    return yaml.safe_dump(values)


def snippets(page: Path, kinds: tuple[str, ...]) -> list[tuple[str, str]]:
    found = SNIPPET.finditer(page.read_text(encoding="utf-8"))
    return [(match["kind"], match["code"]) for match in found if match["kind"] in kinds and not match["skip"]]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_command(line: str) -> None:
    from optimum.commands import optimum_cli

    arguments, sys.argv = sys.argv, shlex.split(line)
    try:
        optimum_cli.main()
    finally:
        sys.argv = arguments


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p, ("python", "bash", "yaml"))], ids=page_name)
def test_snippets_run(page, tmp_path, monkeypatch):
    for recipe in page.parent.glob("*.yaml"):  # a page of recipes is read beside them
        (tmp_path / recipe.name).write_text(recipe_here(recipe.read_text(encoding="utf-8")))
    for name in ("text.jsonl", "code.jsonl", "calibration.jsonl"):
        rows = [json.dumps({"text": text}) for text in demo_texts("calibration")[:40]]
        (tmp_path / name).write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for kind, code in snippets(page, ("python", "bash", "yaml")):
        if kind == "python":
            exec(compile(code, f"{page_name(page)}", "exec"), namespace)
        elif kind == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", code)
            path = tmp_path / (name[1] if name else "unnamed.yaml")
            path.write_text(code)
            if name:
                HeaprConfig.from_file(path)
        else:
            for line in code.replace("\\\n", " ").splitlines():
                # Installation and the test command are what continuous integration runs.
                if line.startswith("optimum-cli heapr "):
                    run_command(command_here(line.partition(" && ")[0].partition("  #")[0]))


def test_snippets_that_do_not_run_are_few_and_say_why():
    skipped = [match for page in PAGES for match in SNIPPET.finditer(page.read_text()) if match["skip"]]
    for match in skipped:
        assert len(match["skip"].split(":", 1)[1].strip(" ->\n")) > 5


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert os.path.exists(page.parent / target), f"{page_name(page)} links to {target}, which does not exist"
