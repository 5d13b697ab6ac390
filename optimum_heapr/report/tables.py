# Licensed under the Apache License, Version 2.0
"""A report as tables: what Markdown, the page and the terminal have in common."""

from __future__ import annotations

import statistics as stats
from dataclasses import dataclass, field
from typing import Any

from .jump import jump_text
from .numbers import change, count, layer_names, signed, size


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        title (`str`): heading.
        header (`list[str]`): of the columns; the first holds names, the others numbers.
        rows (`list[list[str]]`): cells.
        notes (`list[str]`): sentences below.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def report_tables(report: dict[str, Any]) -> list[Table]:
    """All tables of a report; those without content are left out."""
    made = [
        comparison(report),
        search(report),
        layers(report),
        importance(report),
        coverage(report),
        compensation(report),
    ]
    made.append(reconstruction(report))
    return [table for table in made if table.rows]


def comparison(report: dict[str, Any], speed: bool = True) -> Table:
    """Before, after and change of everything that has both, or of all but speed and memory."""
    removed, rows, notes = report["removed"], [], []

    def add(name: str, before: Any, after: Any, write) -> None:
        if before is not None and after is not None:
            rows.append([name, write(before), write(after), change(before, after)])

    add("routed atomic experts", removed["before"], removed["after"], "{:,}".format)
    if "size" in report:
        before, after = report["size"]["before"], report["size"]["after"]
        add("parameters", before["parameters"], after["parameters"], count)
        add("active parameters a token", before["active_parameters"], after["active_parameters"], count)
        add("FLOPs a token", before["flops_per_token"], after["flops_per_token"], count)
        add("weights", before["weight_bytes"], after["weight_bytes"], size)
        if before["flops_per_token"]:
            notes.append(
                "Active parameters are a mean over the calibration tokens and the experts that they were routed to. FLOPs "
                "are two for each of them that is multiplied with; attention over the context comes on top, unchanged."
            )
    measured = report["loss"].get("measured")
    if measured:
        before, after = measured["before"], measured["after"]
        error = measured["increase_standard_error"]
        rows.append(
            ["loss, nats a token", f"{before['loss']:.4f}", f"{after['loss']:.4f}"]
            + [f"{signed(measured['increase'])} ± {error:.4f}"]
        )
        add("perplexity", before["perplexity"], after["perplexity"], "{:.3f}".format)
        notes.append(
            f"Measured on {before['num_tokens']:,} tokens in {measured['windows']} windows of {measured_on(report)}; ± is one "
            "standard error, of the difference on the same windows."
        )
        if text := jump_text(report):
            notes.append(f"Look at this before you use it: {text}.")
    if speed and "speed" in report:
        before, after = report["speed"]["before"], report["speed"]["after"]
        add("prefill, tokens/s", before["prefill"], after["prefill"], _speed)
        add("decode, tokens/s", before["decode"], after["decode"], _speed)
        add("peak memory", before["peak_bytes"], after["peak_bytes"], size)
        spread = max(side[name] for side in (before, after) for name in ("prefill_spread", "decode_spread"))
        notes.append(
            f"Speed on {after['device']}: prompts of {after['prompt_tokens']} tokens, {after['new_tokens']} new ones, batch "
            f"size {after['batch_size']}, median of {after['repetitions']}; repetitions differed by up to ±{spread:.0%}. "
            "A short measurement: `optimum-cli heapr evaluate --speed` takes more time over it."
        )
    notes += [f"Not measured: {problem}" for problem in report.get("problems", [])]
    return Table("Before and after", ["", "before", "after", "change"], rows, notes)


def measured_on(report: dict[str, Any]) -> str:
    """What the loss was measured on, in words."""
    measured = report["loss"]["measured"]
    return measured["source"] + (" that calibration did not see" if measured["held_out"] else "")


def search(report: dict[str, Any]) -> Table:
    """What was measured to find out how much can go."""
    rows = [
        [f"{point['ratio']:.2%}", signed(point["increase"]), f"{point['error']:.4f}"]
        + ["taken" if point["ratio"] == report["removed"]["ratio"] else ""]
        for point in report.get("search", [])
    ]
    bound = report["config"].get("max_loss_increase")
    notes = [
        f"Allowed are {bound} nats a token, the standard error included, on text that neither calibration nor the report sees."
    ]
    return Table("How much to cut", ["removed", "loss +", "± s.e.", ""], rows, notes if rows else [])


def layers(report: dict[str, Any]) -> Table:
    """What is left of each layer."""
    rows = []
    for name, block in zip(layer_names([block["path"] for block in report["blocks"]]), report["blocks"]):
        dropped, total = block.get("dropped", []), block["width"] * len(block["widths"])
        widths = [width for expert, width in enumerate(block["widths"]) if expert not in dropped]
        rows.append(
            [name, str(len(block["widths"])), *([str(len(widths))] if dropped else [])]
            + [str(block["width"]), f"{sum(widths) / total:.1%}", str(min(widths))]
            + [f"{stats.median(widths):g}", str(max(widths)), str(widths.count(0)), str(len(block["unreached"]))]
            + [f"{block['estimated_loss_increase']:.5f}"]
        )
    loss = report["loss"]
    notes = [
        f"Estimated increase of the loss: {loss['estimated_increase']:.4f} nats a token, second order, layers added up."
    ]
    if "by_source" in loss:
        notes.append(sources_text(loss["by_source"]))
    if "measured" in loss:
        increase, error = loss["measured"]["increase"], loss["measured"]["increase_standard_error"]
        notes.append(f"Measured increase: {signed(increase)} ± {error:.4f} on {measured_on(report)}.")
    in_router = ["in the router"] if any(block.get("dropped") for block in report["blocks"]) else []
    header = ["layer", "experts", *in_router, "width", "kept", "narrowest", "median", "widest", "empty", "unreached"]
    header.append("est. loss +")
    if in_router:
        notes.append(
            "Experts that went from the router are in the report file by their numbers; tokens go to the others."
        )
    return Table("What was removed where", header, rows, notes)


def sources_text(sources: list[dict[str, Any]]) -> str:
    """What each source of the text is estimated to lose, and which loses most.

    Args:
        sources (`list[dict]`): of a plan.
    """
    parts = ", ".join(f"{source['name']} {signed(source['increase'])}" for source in sources)
    worst = max(sources, key=lambda source: source["increase"])
    return f"Estimated by source, without compensation: {parts} nats a token; {worst['name']} loses most."


def importance(report: dict[str, Any]) -> Table:
    """Quantiles of the importance of what stays and of what goes."""
    found = report["importance"]
    if not found or not found["edges"]:
        return Table("Importance", [], [])
    header, rows = ["atomic experts", "number", "10 %", "median", "90 %"], []
    for name in ("kept", "removed"):
        counts = found[name]
        if sum(counts):
            quantiles = [f"{_quantile(found, counts, share):.3g}" for share in (0.1, 0.5, 0.9)]
            rows.append([name, f"{sum(counts):,}", *quantiles])
    notes = []
    if found["cut"] is not None:
        notes.append(f"Cut at {found['cut']:.3g} of criterion {report['config']['criterion']}.")
    if sum(found["below"]):
        kept, removed = found["below"]
        notes.append(f"Without importance, or never measured: {kept:,} kept, {removed:,} removed.")
    return Table("Importance", header, rows, notes)


def coverage(report: dict[str, Any]) -> Table:
    """How many calibration tokens experts got."""
    rows, reached = [], True
    for name, block in zip(layer_names([block["path"] for block in report["blocks"]]), report["blocks"]):
        tokens = block["tokens"]
        if tokens:
            scarce = sum(0 < number < block["width"] for number in tokens)
            reached &= not block["unreached"]
            rows.append(
                [name, f"{min(tokens):,}", f"{stats.median(tokens):,.0f}", f"{max(tokens):,}", str(scarce)]
                + [", ".join(map(str, block["unreached"])) or "none"]
            )
    header = ["layer", "fewest tokens", "median", "most", "fewer than wide", "unreached experts"]
    notes = ["`fewer than wide`: experts with fewer tokens than atomic experts, whose scores are rough."]
    return Table("Expert coverage", header, rows, notes if rows else [])


def compensation(report: dict[str, Any]) -> Table:
    """What compensation did to the error of the experts' outputs."""
    rows = []
    for name, block in zip(layer_names([block["path"] for block in report["blocks"]]), report["blocks"]):
        if done := block.get("compensation"):
            rows.append(
                [name, str(done["experts"]), str(done["changed"]), f"{done['before']:.4f}", f"{done['after']:.4f}"]
                + [change(done["before"], done["after"])]
            )
    header = ["layer", "cut experts", "compensated", "error before", "error after", "change"]
    outputs = "outputs of the experts that were cut"
    if report["config"].get("compensation_scope") == "block":
        outputs = "routed outputs, with all experts of a layer compensated together"
    notes = [f"Mean relative squared error of the {outputs}, on the calibration tokens."]
    return Table("Compensation", header, rows, notes if rows else [])


def reconstruction(report: dict[str, Any]) -> Table:
    """What training did to the outputs of the layers, and whether it was kept."""
    errors, rows = ("removed", "fitted", "trained"), []
    for name, block in zip(layer_names([block["path"] for block in report["blocks"]]), report["blocks"]):
        if done := block.get("reconstruction"):
            shown = ("not finite" if done[error] is None else f"{done[error]:.4f}" for error in errors)
            rows.append([name, *shown, done["kept"], change(done["fitted"], done[done["kept"]])])
    header = ["layer", "plain removal", "fitted", "trained", "kept", "change"]
    notes = [
        "Relative squared error of the outputs of layers, shared experts included, on calibration tokens that were held out: "
        "they decide whether what compensation fitted or what was trained from it is kept."
    ]
    return Table("Reconstruction", header, rows, notes if rows else [])


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _quantile(found: dict[str, Any], counts: list[int], share: float) -> float:
    """Middle of the bin in which the share is reached."""
    target, seen = share * sum(counts), 0
    for index, number in enumerate(counts):
        seen += number
        if seen >= target:
            low, high = found["edges"][index : index + 2]
            return (low * high) ** 0.5 if found["scale"] == "log" else (low + high) / 2
    return found["edges"][-1]
