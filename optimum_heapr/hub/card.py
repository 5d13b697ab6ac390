# Licensed under the Apache License, Version 2.0
"""The model card of a pruned model: what was done, to what, with what, and how to load the result.

It says what the plan, the statistics and the checkpoint say, and nothing else: the licence is the base model's or left out,
and figures are those that were measured and handed over.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..demo import DEMO_MODEL
from ..report.tables import comparison
from ..text.mixtures import parse_sources
from ..text.sources import FILE_BUILDERS, PRESETS
from ..utils.companions import CARD_NAME, CHART_NAME, FOLDER, PLAN_NAME
from ..utils.errors import HeaprError
from ..utils.public import public_name
from .base_model import BaseModel


if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard
    from transformers import PreTrainedModel

    from ..planning.plan import PruningPlan


PLACEHOLDER = "path/to/this/model"
"""Stands for the model's name until it is pushed and has one."""

TAGS = ["moe", "pruning", "heapr", "optimum-heapr"]
_PLOT = (
    f"![Kept share of each expert, by layer and expert]({FOLDER}/{CHART_NAME})\n\nAll figures and plots are in `{FOLDER}/report.html`, "
    "which opens without a network, and beside it as Markdown and JSON.\n\n"
)
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
}


def write_card(
    folder: Path,
    model: PreTrainedModel,
    plan: PruningPlan,
    base: BaseModel,
    results: Sequence[EvalResult] = (),
    report: dict[str, Any] | None = None,
) -> None:
    """Writes `README.md` beside a pruned model that was saved into `folder`, with its report if there is one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    card = model_card(model, plan, base, results, "auto_map" in config, report)
    (folder / CARD_NAME).write_text(str(card), encoding="utf-8")


def model_card(
    model: PreTrainedModel,
    plan: PruningPlan,
    base: BaseModel,
    results: Sequence[EvalResult] = (),
    has_code: bool = True,
    report: dict[str, Any] | None = None,
) -> ModelCard:
    """The card of a pruned model. Deterministic: the ways to prune a model give the same card.

    Args:
        model (`PreTrainedModel`): the pruned model, with or without storage.
        plan (`PruningPlan`): what it was cut by.
        base (`BaseModel`): what it was before.
        results (`Sequence[EvalResult]`): what was measured; see [`perplexity_result`].
        has_code (`bool`): whether the checkpoint brings its own modeling files, or is of a stock architecture.
        report (`dict`, *optional*): the report that stands beside the card; what it measured goes into the card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    from ..modeling.modeling_heapr import auto_class_name

    measured = (report or {}).get("loss", {}).get("measured")
    results = [*results, *([held_out_result(measured)] if measured else [])]
    auto_class = auto_class_name(type(model.config))
    name = f"{base.name.split('/')[-1]}-heapr-{plan.ratio:.0%}".replace("%", "")
    data = ModelCardData(
        base_model=base.name if base.on_hub else None,
        library_name="transformers",
        pipeline_tag=_PIPELINES[auto_class],
        tags=list(TAGS),
        datasets=_hub_datasets(plan),
        model_name=name if results else None,
        eval_results=list(results) or None,
        **base.metadata,
    )
    body = "\n\n".join(
        [
            f"# {base.name} without {plan.ratio:.1%} of its routed atomic experts",
            _summary(model, plan, base),
            "## Use it\n\n" + _usage(auto_class, has_code),
            "## What was removed\n\n" + (_PLOT if report else "") + _layers(plan),
            *(["## Measured\n\n" + _measurements(results, report)] if results else []),
            "## Recipe\n\n" + _recipe(plan),
            "## Limits\n\n" + _limits(plan, bool(results), (report or {}).get("left_out")),
        ]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def point_to_folder(card: str) -> str:
    """A card that was written when what is ours stood in the root beside it, for where it stands now."""
    return card.replace(f"]({CHART_NAME})", f"]({FOLDER}/{CHART_NAME})")


def without_measurements(card: str) -> str:
    """A card whose model has changed since it was measured, without the figures."""
    from huggingface_hub import ModelCard

    card = re.sub(r"^## Measured\n.*?(?=^## )", "", card, flags=re.MULTILINE | re.DOTALL)
    changed = ModelCard(card, ignore_metadata_errors=True)
    changed.data.eval_results = None
    return str(changed)


def perplexity_result(
    measured: dict[str, float], dataset: str, dataset_config: str | None = None, split: str | None = "test"
) -> EvalResult:
    """An entry for the card's `model-index` from what `evaluate_perplexity` returned.

    Args:
        measured (`dict[str, float]`): of [`~optimum_heapr.evaluation.perplexity.evaluate_perplexity`].
        dataset, dataset_config, split (`str`, *optional*): the text it was measured on.
    """
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=public_name(dataset),
        dataset_name=public_name(dataset),
        dataset_config=dataset_config,
        dataset_split=split,
        metric_type="perplexity",
        metric_name=f"perplexity over {measured['num_tokens']:,.0f} tokens",
        metric_value=measured["perplexity"],
    )


def held_out_result(measured: dict[str, Any]) -> EvalResult:
    """An entry for the card's `model-index` from what a report measured."""
    # The name of a file or a mixture need not be one that the Hub takes for a dataset.
    kind = re.sub(r"[^\w.-]+", "-", measured["source"]).strip("-.") or "text"
    name = measured["source"] + (" (held out)" if measured["held_out"] else "")
    is_hub_name = _is_hub_name(measured["source"])
    result = perplexity_result(measured["after"], measured["source"] if is_hub_name else kind, split=None)
    result.dataset_name = name
    return result


def _summary(model: PreTrainedModel, plan: PruningPlan, base: BaseModel) -> str:
    before, after = plan.model["num_parameters"], model.num_parameters()
    origin = f"[{base.name}](https://huggingface.co/{base.name})" if base.on_hub else base.name
    origin += f" at `{base.commit}`" if base.commit else ""
    data = plan.data
    calibration = (
        f" Calibrated on {data['num_tokens']:,} tokens in {data['num_samples']:,} samples of "
        f"`{public_name(data['source'])}`."
        if data
        else ""
    )
    return (
        f"Pruned from {origin} by optimum-heapr at the granularity of [HEAPr](https://arxiv.org/abs/2509.22299): atomic "
        f"experts, single neurons of single experts, were removed, ranked by `{plan.config.criterion}`.{calibration}\n\n"
        "| | before | after | removed |\n"
        "|---|---:|---:|---:|\n"
        f"| routed atomic experts | {plan.total:,} | {plan.total - plan.removed:,} | {plan.ratio:.2%} |\n"
        f"| parameters | {before:,} | {after:,} | {1 - after / before:.2%} |"
    )


def _usage(auto_class: str, has_code: bool) -> str:
    load = f'model = {auto_class}.from_pretrained("{PLACEHOLDER}", dtype="auto"'
    imports = f"from transformers import {auto_class}\n\n"
    if not has_code:
        return f"The architecture is that of the base model, so whatever runs it runs this:\n\n{_python(imports + load + ')')}"
    return (
        "Experts have widths of their own. With `optimum-heapr` installed:\n\n"
        f"{_python('import optimum_heapr  # makes transformers know the model' + chr(10) + imports + load + ')')}\n\n"
        "or without it, by the code in this repository:\n\n"
        f"{_python(imports + load + ', trust_remote_code=True)')}"
    )


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _layers(plan: PruningPlan) -> str:
    in_router = [" in the router |", "---:|"] if plan.dropped else ["", ""]
    rows = [f"| block | experts |{in_router[0]} width before | kept | narrowest | widest | empty | unreached |"]
    rows += [f"|---|---:|{in_router[1]}---:|---:|---:|---:|---:|---:|"]
    for path, widths in plan.routed_widths.items():
        experts, width, unreached = len(plan.kept[path]), plan.original_width[path], len(plan.unreached.get(path, []))
        counts = [experts, *([len(widths)] if plan.dropped else []), width, f"{sum(widths) / (experts * width):.1%}"]
        counts += [min(widths), max(widths), widths.count(0), unreached]
        rows.append(f"| `{path}` | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(rows) + (
        "\n\n`kept`: share of the atomic experts of the layer that stay. `unreached`: experts that no calibration token "
        f"was routed to. Which atomic experts stayed is in `{FOLDER}/{PLAN_NAME}`.\n\nEstimated increase of the loss: "
        f"{plan.estimated_loss_increase:.4f} nats a token, from the calibration statistics (second order, blocks added "
        "up); an estimate, not a measurement."
    )


def _measurements(results: Sequence[EvalResult], report: dict[str, Any] | None) -> str:
    rows = ["| dataset | split | metric | value |", "|---|---|---|---:|"]
    for result in results:
        dataset = f"{result.dataset_name} {result.dataset_config or ''}".strip()
        value = f"{result.metric_value:.4f}" if isinstance(result.metric_value, float) else result.metric_value
        rows.append(
            f"| {dataset} | {result.dataset_split or ''} | {result.metric_name or result.metric_type} | {value} |"
        )
    if report and "measured" in report["loss"]:
        table = comparison(report, speed=False)  # which is that of one machine
        rows += ["", "| " + " | ".join(table.header) + " |", "|---|---:|---:|---:|"]
        rows += ["| " + " | ".join(row) + " |" for row in table.rows]
        rows += ["", " ".join(table.notes)]
    return "\n".join(rows)


def _recipe(plan: PruningPlan) -> str:
    from importlib.metadata import version

    import yaml

    options = {name: value for name, value in plan.config.to_dict().items() if value is not None}
    return (
        f"```yaml\n{yaml.safe_dump(options, sort_keys=False, allow_unicode=True)}```\n\n"
        "Saved as `recipe.yaml`, it is what `optimum-cli heapr prune --config recipe.yaml` reads.\n\n"
        + ", ".join(f"{package} {version(package)}" for package in ("optimum-heapr", "transformers", "torch"))
        + "."
    )


def _limits(plan: PruningPlan, was_measured: bool, left_out: str | None) -> str:
    unreached = sum(map(len, plan.unreached.values()))
    lines = [
        "Importance was measured on the calibration text. What that text does not contain, such as other languages or "
        "tasks, may have lost more than its perplexity shows; measure what you need before you rely on it.",
        "The limits and biases of the base model are still there.",
    ]
    if not was_measured:
        lines.insert(0, "The quality of this model was not measured when this card was written.")
    if left_out:
        lines.append(f"Speculative decoding by layers of the model itself is gone: {left_out}.")
    if unreached:
        fate = "stayed as they were" if plan.config.protect_unreached else "were ranked without having been measured"
        lines.append(f"No calibration token reached {unreached} experts; they {fate}.")
    if plan.dropped:
        count, experts = len(next(iter(plan.dropped.values()))), len(next(iter(plan.kept.values())))
        lines.append(
            f"{count} of the {experts} routed experts of each layer went from its router; their tokens go to the others."
        )
    if plan.config.compensate:
        lines.append(
            "What stays of the down projections was changed by least squares to make up for what was removed."
        )
    trained = sum(done["kept"] == "trained" for done in plan.reconstruction.values())
    if trained:
        lines.append(
            f"What stays of the experts of {trained} layers was then trained on the outputs of the unpruned layers, for "
            f"{plan.config.reconstruction_steps} steps each."
        )
    if plan.config.layout == "padded":
        lines.append("Experts are zero-padded to one width: the zeros take memory and do nothing.")
    return "\n".join(f"* {line}" for line in lines)


def _hub_datasets(plan: PruningPlan) -> list[str] | None:
    """The parts of the calibration text that have a name on the Hub."""
    text = plan.data.get("source", "")
    if text != plan.config.dataset and "/" not in text:
        return None  # the class of data that was handed over, no name
    try:
        sources = parse_sources(text)
    except HeaprError:
        return None  # statistics that were merged
    names = [PRESETS.get(source.name, (source.name,))[0] for source in sources]
    return [name for name in dict.fromkeys(names) if _is_hub_name(name)] or None


def _is_hub_name(name: str) -> bool:
    is_local = Path(name).suffix in FILE_BUILDERS or os.path.exists(name) or name == DEMO_MODEL
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not is_local
