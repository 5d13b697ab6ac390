# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr families`: which model families of the installed transformers can be pruned."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .base import HeaprSubcommand


class FamiliesCommand(HeaprSubcommand):
    NAME = "families"
    HELP = "List the model families of the installed transformers, and whether they can be pruned."

    @staticmethod
    def parse_args(parser):
        parser.add_argument("--markdown", action="store_true", help="print the table of the documentation page")

    def execute(self) -> Any:
        from ..families import families_markdown, scan_families
        from .tables import table

        families = scan_families()
        if self.args.markdown:
            self.show(families_markdown(families))
        else:
            rows = [[family.model_type, family.model_class, family.status, family.note] for family in families]
            self.show(table(["model type", "class", "status", "note"], rows))
        return [asdict(family) for family in families]
