# Licensed under the Apache License, Version 2.0
"""The content of a report as plain JSON types: `report.json`, which everything else is rendered from."""

from __future__ import annotations

import dataclasses
import statistics as stats
from typing import TYPE_CHECKING, Any

from ..evaluation.losses import mean_with_error, perplexity
from ..utils.public import public_data, public_name, public_text
from .shown import Report


if TYPE_CHECKING:
    from ..planning.plan import PruningPlan
    from .observation import Observation, Workload


FORMAT = "heapr_report"
VERSION = 1


def build_report(
    plan: PruningPlan,
    model: str,
    before: Observation | None = None,
    after: Observation | None = None,
    workload: Workload | None = None,
) -> Report:
    """Everything that is known of one pruning.

    Args:
        plan (`PruningPlan`): as it was applied, so that it holds what compensation did.
        model (`str`): what the unpruned model is called.
        before, after (`Observation`, *optional*): of the model.
        workload (`Workload`, *optional*): what the two were measured on.

    Returns:
        `Report`: a `dict` of plain JSON types. `removed` counts atomic experts, `blocks` has what happened to each layer, `size`, `loss`,
        `speed` and `samples` compare before and after; of what was not measured there is nothing, and `problems` says
        why if it went wrong. Under `loss`, `by_source` is what each source of a mixture is estimated to lose. `left_out`, which is among them, is what the checkpoint had and the result has not.
    """
    report = Report(
        {
            "format": FORMAT,
            "version": VERSION,
            "model": model,
            "versions": _versions(),
            "config": {name: value for name, value in plan.config.public().to_dict().items() if value is not None},
            "calibration": public_data(plan.data),
            "removed": {
                "before": plan.total,
                "after": plan.total - plan.removed,
                "ratio": plan.ratio,
                "asked_for": dict([plan.config.goal]),
            },
            "blocks": [_block(plan, path) for path in plan.kept],
            "importance": plan.importance,
            **({"rectangles": plan.rectangles} if plan.rectangles else {}),
            **({"search": plan.search} if plan.search else {}),
            "loss": {
                "estimated_increase": plan.estimated_loss_increase,
                **({"by_source": plan.sources} if plan.sources else {}),
            },
        }
    )
    if before is None or after is None:
        return report
    report["size"] = {side: dataclasses.asdict(seen.size) for side, seen in (("before", before), ("after", after))}
    if workload is not None and before.losses is not None and after.losses is not None:
        report["loss"]["measured"] = _measured(before.losses, after.losses, workload)
    if before.speed is not None and after.speed is not None:
        report["speed"] = {"before": dataclasses.asdict(before.speed), "after": dataclasses.asdict(after.speed)}
    if before.completions and len(before.completions) == len(after.completions):
        texts = [workload.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in workload.prompts]
        report["samples"] = [
            {"prompt": prompt, "before": first, "after": second}
            for prompt, first, second in zip(texts, before.completions, after.completions)
        ]
    problems = [f"before: {problem}" for problem in before.problems] + [
        f"after: {problem}" for problem in after.problems
    ]
    if before.left_out:
        report["left_out"] = before.left_out
        problems.append(before.left_out)
    if problems:
        report["problems"] = [public_text(problem) for problem in problems]
    return report


def without_measurements(report: dict[str, Any], reason: str) -> Report:
    """A report of a model that has changed since it was measured: what was measured of it goes, and the reason is given."""
    kept = {name: value for name, value in report.items() if name not in ("speed", "samples")}
    loss = {name: report["loss"][name] for name in ("estimated_increase", "by_source") if name in report["loss"]}
    return Report({**kept, "loss": loss, "problems": [*report.get("problems", []), reason]})


def _block(plan: PruningPlan, path: str) -> dict[str, Any]:
    block = {
        "path": path,
        "width": plan.original_width[path],
        "widths": plan.widths[path],
        **({"dropped": plan.dropped[path]} if plan.dropped else {}),
        "tokens": plan.tokens.get(path),
        "unreached": plan.unreached.get(path, []),
        "estimated_loss_increase": plan.loss_increase[path],
    }
    cut = plan.made_up_for.get(path)
    if cut:
        before, after = (stats.fmean(side) for side in zip(*cut))
        changed = sum(after < before for before, after in cut)
        block["compensation"] = {"experts": len(cut), "changed": changed, "before": before, "after": after}
    if path in plan.reconstruction:
        block["reconstruction"] = plan.reconstruction[path]
    return block


def _measured(before: list[float], after: list[float], workload: Workload) -> dict[str, Any]:
    counts = [len(window) - 1 for window in workload.windows]
    increase, error = mean_with_error([second - first for first, second in zip(before, after)], counts)
    return {
        "source": public_name(workload.source),
        "held_out": workload.held_out,
        "windows": len(counts),
        "before": perplexity(before, counts),
        "after": perplexity(after, counts),
        "increase": increase,
        "increase_standard_error": error,
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("optimum-heapr", "transformers", "torch")}
