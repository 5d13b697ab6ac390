# Licensed under the Apache License, Version 2.0
"""The documentation as a site: its table of contents, its reference pages, and that what is wrong fails the build."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import optimum_heapr
from tests.processes import run_python


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SOURCE = DOCS / "source"
PAGES = sorted(SOURCE.rglob("*.md"))


@pytest.fixture(scope="module")
def reference():
    """The module that makes reference pages; it is no part of the package."""
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(docs: Path, output: Path) -> subprocess.CompletedProcess:
    """As `python docs/build.py -o output`."""
    script = "import runpy, sys\ndel sys.argv[0]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    return run_python(
        script, docs / "build.py", "-o", output, env={**os.environ, "PYTHONPATH": str(ROOT)}, has="libraries"
    )


def needs_sphinx() -> None:
    for name in ("sphinx", "myst_parser", "sphinx_copybutton", "furo", "latex2mathml"):
        pytest.importorskip(name, reason="needs the extra docs: python -m pip install -e '.[docs]'")


def test_the_table_of_contents_names_every_page_once():
    contents = yaml.safe_load((SOURCE / "_toctree.yml").read_text(encoding="utf-8"))
    named = [page["local"] for section in contents for page in section["sections"]]
    there = [page.relative_to(SOURCE).with_suffix("").as_posix() for page in PAGES]
    assert sorted(named) == there, "docs/source/_toctree.yml must name every page under docs/source, and no other"


def test_what_pages_import_is_on_a_reference_page(reference):
    documented = {
        reference.canonical_name(reference.find(name))
        for page in PAGES
        for name in reference.documented_names(page.read_text(encoding="utf-8"))
    }
    used = {f"{optimum_heapr.__name__}.{name}" for name in optimum_heapr.__all__}
    for page in [*PAGES, ROOT / "README.md"]:
        for module, names in re.findall(r"from (optimum_heapr\S*) import (.+)", page.read_text(encoding="utf-8")):
            used |= {f"{module}.{name.strip()}" for name in names.split(",")}
    assert len(used) > len(optimum_heapr.__all__)
    missing = {name for name in used if reference.canonical_name(reference.find(name)) not in documented}
    assert not missing, "each needs an [[autodoc]] line in docs/source/package_reference"


def test_the_page_of_commands_is_what_the_parsers_say(reference):
    page = (SOURCE / "package_reference" / "cli.md").read_text(encoding="utf-8")
    assert "%(" not in page, "defaults are said, not their place in a text"
    assert page == reference.commands_markdown(), "run: python docs/build.py --update-commands"


@pytest.mark.slow
def test_the_site_is_built_and_needs_no_network(tmp_path):
    needs_sphinx()
    done = build(DOCS, tmp_path / "site")
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {page: page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html")}
    assert len(pages) >= len(PAGES)
    for page, text in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]* src="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]* href="([^"]+)"', text)
        assert not [address for address in loaded if "://" in address or address.startswith("//")], page
    pruner = pages[tmp_path / "site" / "package_reference" / "pruner.html"]
    assert 'id="optimum_heapr.HeaprPruner.prune"' in pruner
    assert 'href="hub.html#optimum_heapr.hub.push.push_folder"' in pruner  # a reference in a docstring
    assert "[[autodoc]]" not in pruner and "Args:" not in pruner
    assert "<math" in pages[tmp_path / "site" / "concepts" / "one_pass.html"]


@pytest.mark.slow
def test_what_is_wrong_fails_the_build(tmp_path):
    needs_sphinx()
    docs = tmp_path / "docs"
    shutil.copytree(DOCS, docs, ignore=shutil.ignore_patterns("source"))
    (docs / "source").mkdir()
    wrong = {
        "index.md": "# A\n\n[page](nowhere.md) [anchor](other.md#nowhere) [`HeaprPruner.plan`]\n",
        "other.md": "# Other\n\n[`HeaprPruner.nothing`]\n",
        "another.md": "# Another\n\n[[autodoc]] hub.nothing\n",
        "forgotten.md": "# Forgotten\n",
    }
    for name, text in wrong.items():
        (docs / "source" / name).write_text(text)
    pages = [{"local": name, "title": name} for name in ("index", "other", "another", "missing")]
    (docs / "source" / "_toctree.yml").write_text(yaml.safe_dump([{"title": "All", "sections": pages}]))
    done = build(docs, tmp_path / "site")
    assert done.returncode != 0
    for complaint in (
        "'nowhere.md'",
        "'nowhere'",
        "optimum_heapr.pruner.HeaprPruner.plan",
        "HeaprPruner.nothing: there is no such object",
        "hub.nothing: there is no such object",
        "nonexisting document 'missing'",
        "forgotten.md: WARNING: document isn't included in any toctree",
    ):
        assert complaint in done.stderr, done.stderr


def test_sections_of_docstrings_become_lists(reference):
    page = reference.autodoc("hub.push.push_folder")
    assert "- **repo\\_id** (`str`): `NAME` or `OWNER/NAME` of the repository." in page
    assert "**Returns**: `CommitInfo`: the address" in page
    assert "- {py:obj}`HeaprError <optimum_heapr.HeaprError>`: if the Hub refuses" in page
    narrowed = reference.autodoc("HeaprPruner", ["plan"])
    assert "{py:method} plan(statistics=None, **changes)" in narrowed and "{py:method} apply" not in narrowed
