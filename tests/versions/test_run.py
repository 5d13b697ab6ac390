# Licensed under the Apache License, Version 2.0
"""Which versions the suite can be run with; the runs themselves take environments of their own."""

import re

from tests.helpers import repository
from tests.versions.run import lowest


def test_the_lowest_versions_are_the_bounds_of_the_settings():
    settings = """
[options]
install_requires =
    torch>=2.9
    transformers>=5.17,<6
    tqdm
[options.extras_require]
test =
    pytest-xdist>=3.8
eval =
    lm-eval[ifeval]>=0.4.13
docs =
    furo
plots =
    matplotlib>=3
"""
    assert lowest(settings) == ["torch==2.9", "transformers==5.17", "pytest-xdist==3.8", "lm-eval==0.4.13"]


def test_the_page_of_installation_names_the_lowest_versions():
    bounds = dict(entry.split("==") for entry in lowest((repository() / "setup.cfg").read_text(encoding="utf-8")))
    page = (repository() / "docs" / "source" / "installation.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `([\w.-]+)` \| ([\d.]+) \|", page, re.MULTILINE))
    assert table == {name: bounds[name] for name in table} and {"torch", "transformers"} < set(table)
