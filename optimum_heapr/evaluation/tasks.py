# Licensed under the Apache License, Version 2.0
"""Benchmarks through lm-evaluation-harness (`pip install "optimum-heapr[eval]"`): its tasks, or a folder of your own."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import HeaprError, did_you_mean
from .perplexity import evaluation_mode


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TASK_PRESETS = {
    # The seven zero-shot tasks of the HEAPr paper, in the order of its tables.
    "paper": ("openbookqa", "arc_easy", "winogrande", "hellaswag", "arc_challenge", "piqa", "mathqa"),
    # Multiple choice hides damage that shows when a model writes.
    "generation": ("gsm8k", "ifeval"),
}


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[str],
    include_path: str | os.PathLike | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    chat_template: bool = False,
) -> list[dict[str, Any]]:
    """Runs tasks of lm-evaluation-harness on a model.

    Args:
        model (`PreTrainedModel`): any causal language model, pruned or not.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        tasks (`Sequence[str]`): names of tasks or groups, or of the presets `paper` and `generation`.
        include_path (`str`, *optional*): folder with task files (YAML) of your own; a name that it has goes before one of
            the harness. Its files can name Python functions, which are run: use folders that you trust.
        num_fewshot (`int`, *optional*): examples in the prompt; by default what the task says.
        limit (`int`, *optional*): documents of each task, from its beginning, for a quick look.
        batch_size (`int`): requests at once.
        chat_template (`bool`): render requests by the chat template.

    Returns:
        `list[dict]`: one for each task and metric: `task`, `metric`, `value`, `standard_error` (`None` if the harness gives
        none), `num_fewshot` and `documents`.

    Raises:
        HeaprError: if the harness is not installed, there is no such task, or its data cannot be loaded.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise HeaprError(
            f"tasks={list(tasks)}: lm-evaluation-harness is not installed ({error}); run pip install 'optimum-heapr[eval]'"
        ) from error
    if tokenizer is None:
        raise HeaprError(f"tasks={list(tasks)}: the model has no tokenizer; tasks are text")
    if include_path is not None and not Path(include_path).is_dir():
        raise HeaprError(f"include_path={str(include_path)!r}: no such folder; name one that holds task files (YAML)")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise HeaprError(f"{name}={value}: must be at least 1")
    if chat_template and tokenizer.chat_template is None:
        raise HeaprError("chat_template=True: the tokenizer has none; leave it out")
    names = list(dict.fromkeys(name for task in tasks for name in TASK_PRESETS.get(task, (task,))))
    folder = None if include_path is None else str(include_path)
    # Reading the harness's own fourteen thousand tasks takes ten seconds, which local ones need not wait for.
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, [*manager.all_tasks, *TASK_PRESETS])
            raise HeaprError(
                f"tasks={name!r}: lm-evaluation-harness has no such task{hint or '; see lm-eval ls tasks'}"
            )
    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # it warns that the model was handed over, as it is meant to be
    try:
        with evaluation_mode(model):
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size),
                tasks=names,
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=chat_template,
                log_samples=False,
                bootstrap_iters=1000,
            )
    except (OSError, ValueError, ImportError) as error:  # no network, no such dataset, a package that a task needs
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise HeaprError(f"tasks={names}: cannot be run ({reason})") from error
    return list(_rows(found))


def _rows(found: dict[str, Any]):
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, selection = key.partition(",")
            if not selection or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{selection}")
            yield {
                "task": task,
                "metric": metric if selection == "none" else f"{metric} ({selection})",
                "value": float(value),
                "standard_error": float(error) if isinstance(error, (int, float)) else None,
                "num_fewshot": found.get("n-shot", {}).get(task),
                "documents": found.get("n-samples", {}).get(task, {}).get("effective"),
            }
