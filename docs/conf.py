# Licensed under the Apache License, Version 2.0
"""Settings of Sphinx for `docs/build.py`: Markdown, the table of contents of `_toctree.yml`, formulas without scripts."""

import sys
from pathlib import Path

import yaml
from latex2mathml.converter import convert
from sphinx.util import logging


DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

from reference import page_as_myst  # noqa: E402


logger = logging.getLogger(__name__)

project = "optimum-heapr"
extensions = ["myst_parser", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
nitpicky = True  # a reference that leads nowhere is a warning, and docs/build.py makes warnings errors

smartquotes = False  # options have two hyphens
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "optimum-heapr"
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"
python_maximum_signature_line_length = 88
html_css_files = ["site.css"]
html_static_path = ["static"]
copybutton_selector = "div:not(.highlight-text) > div.highlight pre"  # output is not to be copied

CONTENTS = yaml.safe_load((DOCS / "source" / "_toctree.yml").read_text(encoding="utf-8"))


def table_of_contents() -> str:
    """`_toctree.yml` as hidden directives, which Furo shows at the side."""
    parts = []
    for section in CONTENTS:
        pages = [f"{page['title']} <{page['local']}>" for page in section["sections"] if page["local"] != "index"]
        parts.append("\n".join(["```{toctree}", ":hidden:", f":caption: {section['title']}", "", *pages, "```"]))
    return "\n\n".join(parts)


def read_page(app, name: str, source: list[str]) -> None:
    text = source[0]
    try:
        text = page_as_myst(text)
    except LookupError as error:
        logger.warning("%s", error, location=name)
    source[0] = text + ("\n\n" + table_of_contents() if name == "index" else "")


def write_inline_formula(writer, node) -> None:
    from docutils.nodes import SkipNode

    writer.body.append(convert(node.astext()))
    raise SkipNode


def write_formula(writer, node) -> None:
    from docutils.nodes import SkipNode

    writer.body.append('<div class="math">' + convert(node.astext(), display="block") + "</div>")
    raise SkipNode


def setup(app) -> dict:
    app.connect("source-read", read_page)
    app.add_html_math_renderer("mathml", (write_inline_formula, None), (write_formula, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
