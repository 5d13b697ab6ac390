# Licensed under the Apache License, Version 2.0
"""Builds the documentation as a static site that opens without a network: `python docs/build.py -o site`."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path


DOCS = Path(__file__).parent
COMMANDS = DOCS / "source" / "package_reference" / "cli.md"
FAMILIES = DOCS / "source" / "families.md"


def build(output: str) -> int:
    """Status 0 if every page, link, anchor and reference to an object is right; what is wrong is on standard error."""
    from sphinx.cmd.build import build_main

    with tempfile.TemporaryDirectory() as cache:
        strict = ["--fail-on-warning", "--fresh-env", "--quiet"]
        return build_main([*strict, "-c", str(DOCS), "-d", cache, str(DOCS / "source"), output])


def update_commands() -> None:
    """Writes the page of commands anew, after an option or a command was changed."""
    sys.path[:0] = [str(DOCS), str(DOCS.parent)]
    from reference import commands_markdown

    COMMANDS.write_text(commands_markdown(), encoding="utf-8")


def update_families() -> None:
    """Writes the table of families anew, after another version of transformers was installed."""
    import transformers

    from optimum_heapr.families import families_markdown, scan_families

    major_minor = ".".join(transformers.__version__.split(".")[:2])
    page = re.sub(r"(?<=finds in transformers )[\d.]+\d", major_minor, FAMILIES.read_text(encoding="utf-8"))
    FAMILIES.write_text(
        page.partition("| model type |")[0] + families_markdown(scan_families()) + "\n", encoding="utf-8"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default="site", help="folder for the site (default: site)")
    parser.add_argument(
        "--update-commands", action="store_true", help="write the page of commands from the parsers, and build nothing"
    )
    parser.add_argument(
        "--update-families",
        action="store_true",
        help="write the table of families from the installed transformers, and build nothing",
    )
    args = parser.parse_args()
    if args.update_commands or args.update_families:
        if args.update_commands:
            update_commands()
        if args.update_families:
            update_families()
        return 0
    missing = [
        name
        for name in ("sphinx", "myst_parser", "sphinx_copybutton", "furo", "latex2mathml")
        if find_spec(name) is None
    ]
    if missing:
        sys.exit(f"{', '.join(missing)}: not installed; run: python -m pip install -c constraints.txt -e '.[docs]'")
    status = build(args.output)
    if status == 0:
        print(f"Site written to {args.output}; open {Path(args.output) / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
