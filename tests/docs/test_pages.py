# Licensed under the Apache License, Version 2.0
"""No page is left out, no snippet is exempt, and every link inside the project leads somewhere."""

import os
import re
from pathlib import Path

import pytest

from tests.docs.pages import ENVIRONMENTS, PAGES, ROOT, RUN, SHOWN, has_to_run, page_name, snippets


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
