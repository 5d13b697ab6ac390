# Licensed under the Apache License, Version 2.0
"""Runs the snippets of a page, as a reader would: in one folder, in one namespace, in the order of the page."""

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from optimum_heapr.configuration import HeaprConfig
from optimum_heapr.demo import demo_texts
from tests.docs.commands import Commands
from tests.docs.pages import ROOT, SMALL_MODELS, here, page_name, recipe_here, snippets
from tests.helpers import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from tests.quantized_checkpoints import in_fp8


# Files that pages take to be there.
TEXTS = ("text.jsonl", "code.jsonl", "calibration.jsonl")
TASK = """
task: here
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
ROWS = [{"question": "A list can be", "choices": [" changed", " eaten"], "answer": answer} for answer in (0, 1)]


# Experts as those of the demo: widths that the pages name are there. Heads as wide as vLLM's kernels ask for.
SIZES = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "max_position_embeddings": 512,
    "head_dim": 32,
}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_page(page: Path, folder: Path, environments: Collection[str] = ()) -> None:
    """
    Runs the snippets of a page in the working directory.

    Args:
        page (`Path`): the page.
        folder (`Path`): the working directory, empty.
        environments (`Collection[str]`): what this one is; snippets that need another are left out.
    """
    for recipe in page.parent.glob("*.yaml"):  # a page of recipes is read beside them
        (folder / recipe.name).write_text(recipe_here(recipe.read_text(encoding="utf-8")))
    for name in TEXTS:
        write_rows(folder / name, [{"text": text} for text in demo_texts("calibration")[:40]])
    tasks = folder / "tasks-here"
    tasks.mkdir()
    write_rows(tasks / "rows.jsonl", ROWS)
    (tasks / "here.yaml").write_text(TASK.replace("FOLDER", str(tasks)))
    code = "".join(here(snippet.code) for snippet in snippets(page))
    for name in filter(code.__contains__, SMALL_MODELS):
        tiny_model(SMALL_MODELS[name], **SIZES).save_pretrained(folder / name)
        tiny_tokenizer(folder / name, CHAT_TEMPLATE if "/chat/completions" in code else None)
    if "small-fp8" in code:
        # Wide enough for multiples of 128, as the real one is.
        tiny_model(**{**SIZES, "moe_intermediate_size": 512}).bfloat16().save_pretrained(folder / "small-fp8")
        in_fp8(folder / "small-fp8", block=128)
        tiny_tokenizer(folder / "small-fp8")
    namespace: dict = {"__name__": "__main__"}
    with Commands() as commands:
        for snippet in snippets(page):
            if snippet.environment not in (None, *environments):
                continue
            script = re.match(r"# (\S+\.py)\n", snippet.code)
            if snippet.kind == "python" and script:
                (folder / script[1]).write_text(here(snippet.code))
            elif snippet.kind == "python":
                exec(compile(here(snippet.code), page_name(page), "exec"), namespace)
            elif snippet.kind == "bash":
                commands.run(snippet.code)
            elif snippet.kind == "yaml":
                name = re.match(r"# (\S+\.yaml)\n", snippet.code)
                (folder / name[1]).write_text(recipe_here(snippet.code))
                HeaprConfig.from_file(folder / name[1])


def pages_run(*names: str) -> Callable:
    """A test that runs pages, for a module to hold: the modules share the pages, and the processes of the suite the modules."""

    @pytest.mark.slow
    @pytest.mark.timeout(900)  # a page is many commands
    @pytest.mark.parametrize("name", names)
    def test_snippets_run(name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        run_page(ROOT / name, tmp_path)

    return test_snippets_run
