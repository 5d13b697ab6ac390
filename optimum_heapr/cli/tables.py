# Licensed under the Apache License, Version 2.0
"""Artefacts as plain-text tables."""

from __future__ import annotations

import re
import statistics as stats
from typing import TYPE_CHECKING, Any

import numpy as np

from ..planning.alignment import effective_multiple
from ..planning.size import planned_sizes
from ..report.markdown import summary, title
from ..report.numbers import change, count, signed, size
from ..report.tables import report_tables, sources_text
from .lines import (
    compensation_lines,
    group_lines,
    rectangle_lines,
    rounding_lines,
    search_lines,
    skipped_lines,
    source_lines,
    unreached_lines,
)
from .options import RECOMMENDED, flags_of


if TYPE_CHECKING:
    from ..calibration.statistics import AtomicStatistics
    from ..planning.plan import PruningPlan


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Columns padded to their widest cell; the first, and those without a digit, to the left, numbers to the right."""
    cells = [header, *[[str(cell) for cell in row] for row in rows]]
    columns = list(zip(*cells))
    widths = [max(map(len, column)) for column in columns]
    is_text = [index == 0 or not re.search(r"\d", "".join(column[1:])) for index, column in enumerate(columns)]
    lines = [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width) for cell, width, text in zip(row, widths, is_text)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plan_table(plan: PruningPlan) -> str:
    """Kept widths of each layer, then the totals."""
    rows = []
    for path, widths in plan.routed_widths.items():
        experts = len(plan.kept[path])
        total = experts * plan.original_width[path]
        rows.append(
            [
                path,
                experts,
                *([len(widths)] if plan.dropped else []),
                plan.original_width[path],
                f"{sum(widths) / total:.1%}",
                min(widths),
                f"{stats.median(widths):g}",
                max(widths),
                widths.count(0),
                len(plan.unreached.get(path, [])),
                f"{plan.loss_increase[path]:.5f}",
            ]
        )
    header = ["block", "experts", *(["in router"] if plan.dropped else []), "width", "kept", "min", "median", "max"]
    header += ["empty", "unreached", "est. loss +"]
    config, (goal, asked) = plan.config, plan.config.goal
    multiple = effective_multiple(config, list(plan.original_width.values()))
    return "\n".join(
        [
            table(header, rows),
            "",
            f"criterion {config.criterion}, allocation {config.allocation}, width multiple {multiple}, "
            f"layout {config.layout}",
            f"removed {plan.ratio:.2%} of the routed atomic experts ({plan.removed:,} of {plan.total:,}; asked "
            f"{f'{asked:.2%}' if goal == 'ratio' else ' '.join(flags_of({goal: asked}))}), {plan.parameter_ratio:.2%} of all {plan.model['num_parameters']:,} parameters",
            *rounding_lines(plan, multiple),
            *group_lines(plan),
            size_line(plan),
            f"estimated loss increase {plan.estimated_loss_increase:.5f} nats a token",
            *([sources_text(plan.sources)] if plan.sources else []),
            *search_lines(plan),
            *rectangle_lines(plan),
            *compensation_lines(plan),
            *unreached_lines(plan.unreached),
        ]
    )


def size_line(plan: PruningPlan) -> str:
    """Parameters, those a token uses, and bytes, before and after."""
    before, after = planned_sizes(plan)
    parts = [f"parameters {count(before.parameters)} -> {count(after.parameters)}"]
    if before.active_parameters is not None:
        parts.append(f"active a token {count(before.active_parameters)} -> {count(after.active_parameters)}")
    if before.num_bytes is not None:
        parts.append(f"weights {size(before.num_bytes)} -> {size(after.num_bytes)}")
    return ", ".join(parts)


def perplexity_table(rows: list[dict[str, Any]]) -> str:
    """Perplexities of one or several models, as in the results of a `Comparison`."""
    lines = []
    for row in rows:
        increase = ""
        if row.get("increase") is not None:
            increase = f"{signed(row['increase'])} ± {row['increase_standard_error']:.4f}"
        numbers = [f"{row['perplexity']:.3f}", f"{row['loss']:.4f}", f"{row['loss_standard_error']:.4f}"]
        lines.append([row["model"], row["dataset"], *numbers, row["num_tokens"], increase])
    return table(["model", "dataset", "perplexity", "loss", "± s.e.", "tokens", "against the first"], lines)


def tasks_table(rows: list[dict[str, Any]]) -> str:
    """Metrics of benchmarks, a column for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        found = {row["model"]: row for row in rows if (row["task"], row["metric"]) == (task, metric)}
        lines.append([task, metric, *(_with_error(found.get(model)) for model in models)])
    return table(["task", "metric", *models], lines)


def storage_table(rows: list[dict[str, Any]]) -> str:
    """Bytes of the weights and of the routed experts in them, which a quantizer may have left as they were, by type."""
    lines = []
    for row in rows:
        kinds = sorted(row["experts"].items(), key=lambda item: -item[1])
        types = ", ".join(f"{kind} {size(num_bytes)}" for kind, num_bytes in kinds)
        lines.append([row["model"], size(sum(row["weights"].values())), size(sum(row["experts"].values())), types])
    return table(["model", "weights", "experts", "experts by type"], lines)


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Sizes and speed of one or several models, and what they were measured with."""
    first, lines = rows[0], []
    has_peak = first["peak_bytes"] is not None
    for row in rows:
        fields = [count(row["parameters"]), count(row["active_parameters"]), count(row["flops_per_token"])]
        fields.append(size(row["checkpoint_bytes"] or row["weight_bytes"]))
        for name in ("prefill", "decode"):
            fields.append(f"{row[name]:,.1f} ± {row[f'{name}_spread']:.0%}")
        if has_peak:
            fields.append(size(row["peak_bytes"]))
        fields.append(change(first["decode"], row["decode"]) if row is not first else "")
        lines.append([row["model"], *fields])
    header = ["model", "parameters", "active", "FLOPs/token", "size", "prefill tok/s", "decode tok/s"]
    return (
        table([*header, *(["peak memory"] if has_peak else []), "decode"], lines)
        + f"\n{first['device']}, {first['prompt_tokens']} + {first['new_tokens']} tokens, batch size "
        f"{first['batch_size']}, median of {first['repetitions']} ± half the distance of the quartiles"
    )


def statistics_table(statistics: AtomicStatistics) -> str:
    """Coverage of each layer, then what was measured."""
    rows = []
    for path, block in statistics.blocks.items():
        counts = block.token_count.tolist()
        rows.append(
            [
                path,
                block.num_experts,
                block.width,
                min(counts),
                f"{stats.median(counts):g}",
                max(counts),
                sum(count < block.width for count in counts),
                counts.count(0),
            ]
        )
    header = ["block", "experts", "width", "min tokens", "median", "max", "tokens < width", "unreached"]
    data = statistics.fingerprint["data"]
    return "\n".join(
        [
            table(header, rows),
            "",
            f"{data['num_tokens']:,} tokens in {data['num_samples']} samples of {data['source']}, seed "
            f"{statistics.fingerprint['seed']}; loss {statistics.fingerprint['loss']:.4f} nats a token",
            f"model type {statistics.fingerprint['model']['model_type']}",
            serving_line(statistics),
            *source_lines(data),
            *skipped_lines(statistics.fingerprint.get("skipped", [])),
            *unreached_lines(statistics.unreached),
        ]
    )


def report_text(report: dict[str, Any]) -> str:
    """A report as plain-text tables."""
    parts = [title(report), summary(report).replace("`", "")]
    for part in report_tables(report):
        parts.append("\n".join([part.title, table(part.header, part.rows), *part.notes]).replace("`", ""))
    for sample in report.get("samples", []):
        parts.append("\n".join(f"{name}: {sample[name]!r}" for name in ("prompt", "before", "after")))
    return "\n\n".join(parts)


def importance_table(statistics: AtomicStatistics) -> str:
    """Quantiles in each layer of the importance as published, `1/2 mean(h^2) mean((dL/dh)^2)`, of experts that tokens reached."""
    rows = []
    for path, block in statistics.blocks.items():
        squares = (np.asarray(block.mean(name), np.float64) for name in ("activation_sq_sum", "gradient_sq_sum"))
        measured = np.sort(0.5 * np.prod(list(squares), axis=0)[np.asarray(block.reached)], axis=None)
        if len(measured):
            places = [round(share * (len(measured) - 1)) for share in (0.0, 0.1, 0.5, 0.9, 1.0)]
            rows.append([path, *(f"{measured[place]:.3g}" for place in places)])
    header = ["block", "least", "10 %", "median", "90 %", "most"]
    return f"importance of atomic experts, criterion heapr\n{table(header, rows)}"


def serving_line(statistics: AtomicStatistics) -> str:
    """What can be planned from these statistics, and how to get the rest."""
    blocks = statistics.blocks.values()
    rest = "--compensation-scope block reads the text again"
    if all(block.activation_gram_sum is not None for block in blocks):
        return f"serves every ratio, criterion and layout, and --compensate; {rest}"
    if all(block.has_curves for block in blocks):
        least = min(float(block.removal_ridge.min()) for block in blocks)
        return (
            f"serves every ratio, criterion (obs with ridge {least:.3g}) and layout, but --compensate within experts not: "
            f"calibrate without --no-grams for it; {rest}"
        )
    return (
        "serves every ratio, layout and criterion but obs, and --compensate within experts not: calibrate with --criterion obs "
        f"for these, and for what we recommend, {RECOMMENDED}; {rest}"
    )


def _with_error(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
    return f"{row['value']:.4f}{error}"
