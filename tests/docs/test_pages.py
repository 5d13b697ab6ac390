# Licensed under the Apache License, Version 2.0
"""No page is left out, no snippet is exempt, and every link inside the project leads somewhere."""

import os
import re
from pathlib import Path

import pytest

from optimum_heapr import HeaprConfig
from optimum_heapr.cli.options import RECOMMENDED
from tests.docs.pages import ENVIRONMENTS, PAGES, ROOT, RUN, SHOWN, has_to_run, page_name, snippets


STOCK = {"pruned-uniform"}
MODULES = {path.name: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")}


@pytest.mark.parametrize("page", filter(has_to_run, PAGES), ids=page_name)
def test_a_module_runs_it(page):
    assert any(f'"{page_name(page)}"' in source for source in MODULES.values())


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_snippet_is_run_or_is_output(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- not run" not in text
    assert text.count("```") == 2 * len(snippets(page))
    for snippet in snippets(page):
        assert snippet.kind in RUN + SHOWN
        assert snippet.environment in (None, *ENVIRONMENTS)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_an_environment_runs_the_snippets_that_need_it(environment):
    script = (ROOT / ENVIRONMENTS[environment]).read_text(encoding="utf-8")
    for page in PAGES:
        if any(snippet.environment == environment for snippet in snippets(page)):
            [module] = [name for name, source in MODULES.items() if f'environment = "{environment}"' in source]
            assert f"tests/docs/{module}" in script and f'"{page_name(page)}"' in MODULES[module]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert os.path.exists(page.parent / target), f"{page_name(page)} links to {target}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_what_only_this_package_knows_is_not_loaded_without_it(page):
    """A snippet that begins with its imports may be the first of a process, where transformers would ask to run remote code."""
    for snippet in snippets(page):
        if snippet.kind == "python" and "import AutoModelForCausalLM" in snippet.code:
            loaded = set(re.findall(r'CausalLM\.from_pretrained\(\s*"(\S*pruned\S*)"', snippet.code)) - STOCK
            if (page_name(page), *loaded) != ("docs/source/guides/one_gpu.md", "pruned"):  # which is uniform there
                assert not loaded or re.search(r"\b(import|from) optimum_heapr", snippet.code), loaded


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_one_way_to_prune_is_recommended(page):
    """Wherever something better than the defaults is recommended or pruned with, it is the same, and written the same way."""
    paragraphs = page.read_text(encoding="utf-8").split("\n\n")
    in_python = 'criterion="obs", compensate=True, compensation_scope="block"'
    for paragraph in paragraphs:
        words = " ".join(paragraph.split())
        if re.search(r"\bwe recommend\b", words) and "obs" in words:
            assert in_python in words or RECOMMENDED in words, words
    for snippet in snippets(page):
        for command in re.findall(r"heapr prune .*", snippet.code):
            if re.search(r"--(criterion|compensat)", command) and "--dry-run" not in command:
                assert RECOMMENDED in command, command


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "recipes").glob("*/prune_*.yaml")), ids=lambda path: path.parent.name
)
def test_recipes_are_as_published_or_as_recommended(recipe):
    config = HeaprConfig.from_file(recipe)
    words = f"--criterion {config.criterion} --compensate --compensation-scope {config.compensation_scope}"
    assert (config.criterion, config.compensate) == ("heapr", False) or (config.compensate and words == RECOMMENDED)
