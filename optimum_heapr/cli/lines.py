# Licensed under the Apache License, Version 2.0
"""What is to be said of artefacts besides their tables, in lines; none where there is nothing."""

from __future__ import annotations

import statistics as stats
from typing import TYPE_CHECKING, Any

from ..planning.alignment import GROUPS
from ..report.tables import measured_on


if TYPE_CHECKING:
    from ..planning.plan import PruningPlan


def source_lines(data: dict[str, Any]) -> list[str]:
    """One line for each part of a mixture, with its share of the tokens."""
    parts = data.get("sources", [])
    return [
        f"{part['name']} gave {part['num_tokens'] / sum(p['num_tokens'] for p in parts):.1%} of the tokens, "
        f"{part['num_samples']} samples"
        for part in parts
        if len(parts) > 1
    ]


def skipped_lines(samples: list[int]) -> list[str]:
    """One line if samples were left out."""
    return [f"left out {len(samples)} samples that were not finite: {samples}"] if samples else []


def search_lines(plan: PruningPlan) -> list[str]:
    """What was measured to find out how much can go, and which of it was taken."""
    if not plan.search:
        return []
    head = f"measured, to stay within {plan.config.max_loss_increase} nats a token with one standard error on top:"
    return [head] + [
        f"  removed {point['ratio']:.2%}: loss {point['increase']:+.5f} ± {point['error']:.5f}"
        + (", taken" if point["ratio"] == plan.ratio else "")
        for point in plan.search
    ]


def rounding_lines(plan: PruningPlan, multiple: int) -> list[str]:
    """One line if one width for all experts, rounded up to a multiple, left more than was asked for."""
    goal, asked = plan.config.goal
    if goal != "ratio" or plan.config.allocation != "uniform" or plan.ratio > asked - 0.005:
        return []
    return [f"less than asked, as one width for all is rounded up to a multiple of {multiple}"]


def group_lines(plan: PruningPlan) -> list[str]:
    """One line if quantizers that share a scale among some columns find experts that are no multiple of that."""
    widths = [width for block in plan.routed_widths.values() for width in block if width]
    groups = [group for group in GROUPS if all(width % group == 0 for width in plan.original_width.values())]
    fitting = {group: sum(width % group == 0 for width in widths) for group in groups}
    if all(count == len(widths) for count in fitting.values()):
        return []
    first, *others = fitting
    found = "".join(f", of {group} {fitting[group]}" for group in others)
    line = f"widths that are multiples of {first}: {fitting[first]} of {len(widths)}{found}; quantizers share a scale among so many"
    # What is as wide as an expert leaves nothing to choose within it, and stock layouts refuse that.
    below = [group for group in groups if group < min(plan.original_width.values())]
    if not below or fitting[below[-1]] == len(widths):
        return [line]
    keeps = "--align-for quantization" if below[-1] == GROUPS[-1] else f"--width-multiple {below[-1]}"
    return [f"{line}, and {keeps} keeps to {below[-1]}"]


def rectangle_lines(plan: PruningPlan) -> list[str]:
    """What the number of experts was chosen from."""
    if not plan.rectangles:
        return []
    best = min(plan.rectangles, key=lambda point: point["increase"])
    found = [f"{point['experts']} x {point['width']} {point['increase']:.5f}" for point in plan.rectangles]
    return [
        f"num_experts auto: {best['experts']} experts of width {best['width']}, by the loss that fitted blocks leave, nats a token: "
        + ", ".join(found)
    ]


def compensation_lines(plan: PruningPlan) -> list[str]:
    """What compensation did to the outputs of experts or, where it is over blocks, of layers that lost something."""
    found = plan.made_up_for.values()
    errors = [pairs[0] for pairs in found] if plan.config.compensates_blocks else sum(found, [])
    if not errors:
        return []
    before, after = (stats.fmean(part) for part in zip(*errors))
    changed = sum(after < before for before, after in errors)
    if plan.config.compensates_blocks:
        return [
            f"compensation: mean relative squared error of the routed outputs of {len(errors)} layers {before:.4f} "
            f"-> {after:.4f} on the calibration tokens",
            *_reconstruction_lines(plan),
        ]
    return [
        f"compensation: mean relative squared error of {len(errors)} cut experts {before:.4f} -> {after:.4f} on the "
        f"calibration tokens; {changed} of them changed"
    ]


def _reconstruction_lines(plan: PruningPlan) -> list[str]:
    found = list(plan.reconstruction.values())
    if not found:
        return []
    removed, fitted = (stats.fmean(part[name] for part in found) for name in ("removed", "fitted"))
    kept = stats.fmean(part[part["kept"]] for part in found)
    trained = sum(part["kept"] == "trained" for part in found)
    return [
        f"reconstruction: mean relative squared error of the outputs of {len(found)} layers on held-out tokens {removed:.4f} "
        f"-> {fitted:.4f} fitted -> {kept:.4f}; {trained} of them are kept as trained, the others as fitted"
    ]


def measured_lines(report: dict[str, Any] | None, asked: bool) -> list[str]:
    """What was measured before and after, in a line or two, or why nothing was although that was `asked` for."""
    if report is None:
        return ["not measured: the weights were never all in memory; 'evaluate' compares two models"] if asked else []
    lines = []
    if not report["loss"].get("measured") and not report.get("problems") and asked:
        lines.append(
            "not measured: no text was held out from these statistics; name --eval-dataset, or use 'evaluate'"
        )
    if measured := report["loss"].get("measured"):
        lines.append(
            f"measured loss {measured['before']['loss']:.4f} -> {measured['after']['loss']:.4f}, "
            f"{measured['increase']:+.4f} ± {measured['increase_standard_error']:.4f} nats a token, on {measured_on(report)}"
        )
    return lines + [f"not measured: {problem}" for problem in report.get("problems", [])]


def unreached_lines(unreached: dict[str, list[int]]) -> list[str]:
    """One line a block that has experts no calibration token reached."""
    return [f"no calibration token reached {path} experts {experts}" for path, experts in unreached.items()]
