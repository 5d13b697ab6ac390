# Licensed under the Apache License, Version 2.0
"""Several models, one after another, on the same texts, tasks and prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..demo import DEMO_MODEL
from ..utils.errors import HeaprError
from ..utils.positions import positions_of, warn_of_positions
from .losses import mean_with_error, perplexity
from .perplexity import evaluation_mode, evaluation_windows, window_losses
from .size import ModelSize, routing_counts
from .speed import measure_speed
from .storage import StoredWeights
from .tasks import evaluate_tasks


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Comparison:
    """What is measured, and what was found; the first model that is added is what the others are compared with.

    Args:
        datasets (`Sequence[str]`): texts for the perplexity, as for
            [`~optimum_heapr.evaluation.perplexity.evaluate_perplexity`].
        text_options (`dict`): its other options: `seq_length`, `num_samples`, `dataset_config`, `split`, `text_column`.
        tasks (`Sequence[str]`): benchmarks, as for [`~optimum_heapr.evaluation.tasks.evaluate_tasks`].
        task_options (`dict`): its other options.
        speed_options (`dict`, *optional*): `prompt_length` and the options of
            [`~optimum_heapr.evaluation.speed.measure_speed`]; without it no speed is measured.

    Attributes:
        results (`dict[str, list[dict]]`): by kind, `storage`, `perplexity`, `tasks` and `speed`, one entry for each model and
            text or metric. Perplexities have `increase` and `increase_standard_error` of the loss, against the first model on the
            same windows, unless the tokens are others.

    Raises:
        HeaprError: if an option of the speed is too small.
    """

    datasets: Sequence[str] = ()
    text_options: dict[str, Any] = field(default_factory=dict)
    tasks: Sequence[str] = ()
    task_options: dict[str, Any] = field(default_factory=dict)
    speed_options: dict[str, Any] | None = None
    results: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {"storage": [], "perplexity": [], "tasks": [], "speed": []}, init=False
    )
    _first: dict[str, tuple[list[torch.Tensor], list[float]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name, value in (self.speed_options or {}).items():
            least = 2 if name == "prompt_length" else 1
            if value < least:
                raise HeaprError(f"{name}={value}: must be at least {least}")

    def add(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        weight_files: Sequence[str] = (),
    ) -> None:
        """Measures one model.

        Args:
            name (`str`): what it is called in the results.
            model, tokenizer: of any kind; the tokenizer is needed unless the data has `input_ids`.
            weight_files (`Sequence[str]`): its files, if that is known, for the size on disk.

        Raises:
            HeaprError: if a text or a task cannot be used, or the loss is not finite.
        """
        self.results["storage"].append({"model": name, **dataclasses.asdict(StoredWeights.of(model))})
        for dataset in self.datasets:
            self.results["perplexity"].append({"model": name, **self._perplexity(dataset, model, tokenizer)})
        if self.tasks:
            rows = evaluate_tasks(model, tokenizer, self.tasks, **self.task_options)
            self.results["tasks"] += [{"model": name, **row} for row in rows]
        if self.speed_options is not None:
            on_disk = sum(Path(file).stat().st_size for file in weight_files) or None
            found = {"model": name, "checkpoint_bytes": on_disk, **self._speed(model, tokenizer)}
            self.results["speed"].append(found)

    def _perplexity(
        self, dataset: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> dict[str, Any]:
        windows = evaluation_windows(tokenizer, dataset, **self.text_options)
        warn_of_positions(model, windows)
        losses, counts = window_losses(model, windows, dataset), [len(window) - 1 for window in windows]
        found = {"dataset": dataset, **perplexity(losses, counts)}
        if dataset not in self._first:
            self._first[dataset] = windows, losses
            return found
        first_windows, first_losses = self._first[dataset]
        if len(windows) == len(first_windows) and all(map(torch.equal, windows, first_windows)):
            differences = [after - before for after, before in zip(losses, first_losses)]
            found["increase"], found["increase_standard_error"] = mean_with_error(differences, counts)
        return found

    def _speed(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        options = dict(self.speed_options)
        length, new_tokens = options.pop("prompt_length"), options["new_tokens"]
        room = positions_of(model)
        if room is not None and length + new_tokens >= room:
            raise HeaprError(
                f"prompt_length={length}: with new_tokens={new_tokens} the model has positions for {room} tokens; lower one"
            )
        dataset = self.datasets[0] if self.datasets else DEMO_MODEL
        wanted = {**self.text_options, "seq_length": length, "num_samples": 8 * options["batch_size"]}
        windows = [window for window in evaluation_windows(tokenizer, dataset, **wanted) if len(window) == length]
        if not windows:
            raise HeaprError(
                f"prompt_length={length}: {dataset!r} has less text than that; lower it, or name more text"
            )
        with routing_counts(model) as tokens, evaluation_mode(model), torch.no_grad():
            device = model.get_input_embeddings().weight.device
            model(input_ids=windows[0].unsqueeze(0).to(device), use_cache=False)
        size = ModelSize.of(model, tokens)
        return {**dataclasses.asdict(size), **dataclasses.asdict(measure_speed(model, windows, **options))}
