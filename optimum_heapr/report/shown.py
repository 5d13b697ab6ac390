# Licensed under the Apache License, Version 2.0
"""What a report and a pruner say of themselves where they are printed."""

from __future__ import annotations

from collections.abc import Mapping

from ..experts import BROKEN_OFF
from ..utils.summary import Summary, html_table
from .markdown import title
from .numbers import count
from .tables import Table, comparison


class Report(dict):
    """What is in `report.json`, which prints as the comparison of before and after."""

    def __repr__(self) -> str:
        rows = (": ".join([row[0], " -> ".join(row[1:3])]) + f"  {row[3]}".rstrip() for row in self._table().rows)
        return "\n  ".join([title(self), *rows, *self.get("problems", [])])

    def _repr_html_(self) -> str:
        table = self._table()
        return html_table(title(self), table.rows, table.header)

    def _table(self) -> Table:
        return comparison(self)


class PrunerSummary(Summary):
    """Base of [`~optimum_heapr.HeaprPruner`]: what it holds, stage by stage."""

    def _summary(self) -> Mapping[str, str]:
        broken_off, measured = (
            getattr(self.model, BROKEN_OFF, None),
            (self.report or {}).get("loss", {}).get("measured"),
        )
        name = self.model.config.name_or_path
        lines = {
            "model": f"{type(self.model).__name__}{f' {name}' if name else ''}, {count(self.model.num_parameters())} parameters",
            "config": repr(self.config),
            "calibrated": "no" if self.statistics is None else self.statistics.in_words(),
            "pruned": broken_off or ("no" if self.applied_plan is None else self.applied_plan.in_words()),
        }
        if measured:
            lines["loss"] = (
                f"{measured['before']['loss']:.4f} -> {measured['after']['loss']:.4f} nats a token, on {measured['source']}"
            )
        return lines
