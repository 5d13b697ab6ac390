# Licensed under the Apache License, Version 2.0
"""Documentation is run: every Python and command-line snippet, and every link inside the project.

The snippets of one page share a folder and a namespace and run in the order of the page, as a reader would. One that cannot
run here says so in a comment just above it: `<!-- not run: reason -->`.
"""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from optimum_heapr.configuration import HeaprConfig


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs" / "source").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")])
SNIPPET = re.compile(
    r"(?P<skip><!-- not run: [^>]+ -->\s*)?^```(?P<kind>\w+)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)


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
        shutil.copy(recipe, tmp_path)
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
                    run_command(line.partition(" && ")[0].partition("  #")[0])


def test_snippets_that_do_not_run_are_few_and_say_why():
    skipped = [match for page in PAGES for match in SNIPPET.finditer(page.read_text()) if match["skip"]]
    for match in skipped:
        assert len(match["skip"].split(":", 1)[1].strip(" ->\n")) > 5


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert os.path.exists(page.parent / target), f"{page_name(page)} links to {target}, which does not exist"
