# Licensed under the Apache License, Version 2.0
"""`HeaprPruner`: the whole pipeline behind one object. The file to read first.

    model -> calibrate -> AtomicStatistics -> plan -> PruningPlan -> apply -> pruned model -> save

Each step takes the artefact of the one before, can be run on its own, also in another process, and imports what it needs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calibration.statistics import AtomicStatistics
from .configuration import HeaprConfig
from .experts import BROKEN_OFF, find_expert_blocks
from .frontier import FrontierPoint, frontier
from .hub.push import push_folder, split_push_options
from .hub.statistics import load_statistics
from .planning.plan import PruningPlan
from .report.content import without_measurements
from .report.observation import check_prompts, needs_text
from .report.shown import PrunerSummary
from .text.samples import CalibrationData, load_calibration_data
from .utils.companions import STATISTICS_NAME, own_folder
from .utils.errors import HeaprError
from .utils.files import check_output_is_not_input, replace_folder
from .utils.positions import warn_of_positions


if TYPE_CHECKING:
    from datasets import Dataset
    from huggingface_hub import CommitInfo, EvalResult
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .recovery.configuration import RecoveryConfig
    from .recovery.report import RecoveryReport


class HeaprPruner(PrunerSummary):
    """Prunes a Mixture-of-Experts model at the granularity of atomic experts.

    Args:
        model (`PreTrainedModel`): the model to prune; it is changed in place by [`~HeaprPruner.prune`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed to calibrate on text, and saved beside the model.
        config (`HeaprConfig`, *optional*): how to prune; defaults to `HeaprConfig()`.

    Raises:
        HeaprError: if the model has no routed experts that can be pruned exactly, or was pruned already.

    Example:

    ```python
    from optimum_heapr import HeaprConfig, HeaprPruner

    pruner = HeaprPruner.from_pretrained("demo", HeaprConfig(dataset="demo", num_samples=16, seq_length=256))
    model = pruner.prune()
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: HeaprConfig | None = None,
    ):
        from .checkpoints.stages import stages_of

        self._stages, self.tokenizer, self.config = stages_of(model), tokenizer, HeaprConfig.checked(config)
        find_expert_blocks(model)  # refuses what cannot be pruned before anything is spent on it
        self.statistics: AtomicStatistics | None = None
        self.calibration_data: CalibrationData | None = None
        self.applied_plan: PruningPlan | None = None
        self.report: dict[str, Any] | None = None
        self.recovery_report: RecoveryReport | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model, pruned or not yet."""
        return self._stages.model

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike,
        config: HeaprConfig | None = None,
        statistics: AtomicStatistics | str | os.PathLike | None = None,
        memory: str = "plain",
        activation_memory: int | str | None = None,
        **model_options: Any,
    ) -> HeaprPruner:
        """Loads a model, its tokenizer and statistics: without a `dataset`, those beside it. Of a pruned model, its base model.

        Args:
            model (`str`): a folder, the name of a repository on the Hub, or `demo` for the embedded model.
            config (`HeaprConfig`, *optional*): how to prune.
            statistics (`AtomicStatistics` or `str`, *optional*): a file, or a folder or repository that holds one.
            memory (`str`): `plain` loads the model; `offload` leaves what does not fit on the host or the disk; `streaming`
                never loads it, but goes through it layer by layer; `auto` decides from the memory there is. Unless it is
                `plain`, [`~HeaprPruner.save_pretrained`] cuts the checkpoint file by file.
            activation_memory (`int` or `str`, *optional*): for `streaming`, what layer inputs may take of the host before they go
                to the disk, e.g. `"8GB"`; by default a quarter of what is free.
            model_options: passed to `from_pretrained` of the auto classes: `device_map`, `dtype`, `tp_plan`, `offload_folder`, `revision`,
                `token`, `trust_remote_code`, …; `dequantize=True` turns quantized weights into floating-point numbers.

        Raises:
            HeaprError: if the model cannot be found or pruned, or the statistics are unreadable or of another model.
        """
        from .checkpoints.stages import load_stages

        loaded = load_stages(model, config, statistics, memory, activation_memory, **model_options)
        pruner = cls(loaded.stages.model, loaded.tokenizer, config)
        pruner._stages, pruner.statistics = loaded.stages, loaded.statistics
        return pruner

    def check(self, config: HeaprConfig | None = None) -> None:
        """Refuses with a `HeaprError`, before calibration, what `config` asks for and this model cannot have."""
        from .surgery.feasibility import check_feasible

        check_feasible(self.model, config or self.config)

    def calibrate(
        self,
        dataset: HeaprConfig | Dataset | Sequence[str] | str | None = None,
        state_path: str | os.PathLike | None = None,
        resume: bool = False,
        save_every: int = 0,
        keep_state: bool = False,
        checkpointing: bool = False,
        keep_grams: bool = True,
    ) -> AtomicStatistics:
        """Measures the statistics of every atomic expert, and for `obs` the removal curves; also kept as `self.statistics`.

        Args:
            dataset (`HeaprConfig`, `Dataset` or `str`, *optional*): a config whose calibration part is used, or data in place of
                `config.dataset`: a path, a name on the Hub, texts, or rows with a column `text`, `messages` or `input_ids`.
            state_path (`str`, *optional*): file, or with `memory="streaming"` folder, that an interrupted run goes on from.
            resume, keep_state (`bool`): go on from there, if it exists; leave it, to be removed once the statistics are safe.
            save_every (`int`): micro-batches between two savings; 0 saves on SIGTERM and Ctrl-C only. Streaming saves each layer.
            checkpointing (`bool`): compute each layer twice, in less memory; always so where weights are offloaded.
            keep_grams (`bool`): with `memory="streaming"`, keep second-order matrices, on the disk, for compensation.

        Raises:
            HeaprError: if the data is missing, empty or too short, a gradient is not finite, or the state is of another run.
        """
        config, given = (dataset, None) if isinstance(dataset, HeaprConfig) else (self.config, dataset)
        state = self._stages.state(state_path, resume, save_every)
        self.calibration_data = data = load_calibration_data(config, self.tokenizer, given)
        warn_of_positions(self.model, data.samples)
        self.statistics = self._stages.calibrate(data, config, state, keep_grams, checkpointing)
        if state is not None and not keep_state:
            state.remove()
        return self.statistics

    def plan(self, statistics: AtomicStatistics | str | os.PathLike | None = None, **changes: Any) -> PruningPlan:
        """Decides what stays; the model is left as it is. For `max_loss_increase` some plans are measured with it.

        Args:
            statistics (`AtomicStatistics` or `str`, *optional*): defaults to `self.statistics`.
            changes: options of `HeaprConfig` that differ from `self.config`, e.g. `ratio=0.4`.

        Raises:
            HeaprError: if there are no statistics, they are of another model, or the ratio cannot be reached.
        """
        given = self._stages.measured(statistics, self.statistics), HeaprConfig.checked(self.config.replace(**changes))
        return self._stages.plan(*given, self.calibration_data, self.tokenizer)

    def frontier(self, measure: Dataset | str | None = None, **options: Any) -> list[FrontierPoint]:
        """Size and loss of many plans, as [`~optimum_heapr.frontier.frontier`] with these `options`; nothing is cut.

        Args:
            measure (`Dataset` or `str`, *optional*): text to measure a few of them on, which corrects the estimates of all.
        """
        from .measuring import text_measure

        given = self.model, self.tokenizer, self._stages.measured(None, self.statistics), self.config
        return frontier(*given[2:], measure=None if measure is None else text_measure(*given, measure), **options)

    def apply(
        self,
        plan: PruningPlan | str | os.PathLike,
        statistics: AtomicStatistics | str | os.PathLike | None = None,
        measure: bool = False,
        prompts: Sequence[str] | None = None,
        fits_path: str | os.PathLike | None = None,
    ) -> PreTrainedModel:
        """Cuts the model in place and returns it; `self.report` says what that did. Streamed or offloaded, it is cut when saved.

        Args:
            plan (`PruningPlan` or `str`): what stays.
            statistics (`AtomicStatistics` or `str`, *optional*): for compensation within experts; defaults to `self.statistics`.
            measure (`bool`): measure before and after, as `eval_dataset` and `eval_samples` of the plan's config say.
            prompts (`Sequence[str]`, *optional*): texts to complete before and after; by default beginnings of that text.
            fits_path (`str`, *optional*): folder to keep fitted blocks in, and to go on from, until the model is saved.

        Raises:
            HeaprError: if the plan is of another model, or statistics to compensate with or text to measure on are missing.
        """
        plan = plan if isinstance(plan, PruningPlan) else PruningPlan.load(plan)
        statistics = self.statistics if statistics is None else load_statistics(statistics)
        check_prompts(prompts, self.tokenizer, measure)
        self._stages.check(plan)  # before minutes are spent on it
        if self.calibration_data is None and needs_text(plan.config, measure):
            self.calibration_data = load_calibration_data(plan.config, self.tokenizer)
        data, measured = self.calibration_data, (self.tokenizer, prompts) if measure else None
        self.report, self.applied_plan = self._stages.apply(plan, statistics, data, measured, fits_path), plan
        return self.model

    def prune(self, prompts: Sequence[str] | None = None, **changes: Any) -> PreTrainedModel:
        """Calibrates (unless that was done), plans, measures and applies: the whole job; gives `self.model` back, pruned.

        Args:
            prompts (`Sequence[str]`, *optional*): as for [`~HeaprPruner.apply`].
            changes: options of `HeaprConfig` that differ from `self.config`.
        """
        check_prompts(prompts, self.tokenizer)
        self.check(config := HeaprConfig.checked(self.config.replace(**changes)))
        if self.statistics is None:
            self.calibrate(config, keep_grams=self._stages.needs_matrices(config))
        return self.apply(self.plan(**changes), measure=True, prompts=prompts)

    def recover(
        self,
        dataset: Dataset | str | None = None,
        config: RecoveryConfig | None = None,
        teacher: PreTrainedModel | str | os.PathLike | None = None,
        **options: Any,
    ) -> RecoveryReport:
        """Trains the pruned model with LoRA, and merges that into it if held-out text says so: see `self.recovery_report`.

        Args:
            dataset (`Dataset` or `str`, *optional*): training text, as for [`~HeaprPruner.calibrate`].
            config (`RecoveryConfig`, *optional*): what is trained, and how; names the text where `dataset` does not.
            teacher (`PreTrainedModel` or `str`, *optional*): the unpruned model, to distil from; an object may be cut.
            options: `state_path`, a folder that an interrupted run goes on from with `resume=True`; `adapter_folder`.

        Raises:
            HeaprError: if nothing was pruned yet, or as [`~optimum_heapr.recovery.runner.recover`].
        """
        from .recovery.session import recover_in_memory

        found = recover_in_memory(self.model, self.tokenizer, dataset, config, teacher, self._pruned_by(), **options)
        self._stages.model, self.recovery_report = found
        if self.report is not None and self.recovery_report.improved:
            self.report = without_measurements(self.report, "the model was trained after it was cut and measured")
        return self.recovery_report

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        overwrite: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        results: Sequence[EvalResult] = (),
        **save_options: Any,
    ) -> Path:
        """Writes the pruned model, its tokenizer, generation config and card, and in `heapr/` plan, report and statistics.

        Args:
            folder (`str`): appears whole or not at all, by the first of connected processes; with `overwrite`, for one that we wrote alone.
            push_to_hub (`bool`): upload the folder as well, to `repo_id` or else to a repository of its name.
            results (`Sequence[EvalResult]`): for the card; see [`~optimum_heapr.hub.card.perplexity_result`].
            save_options: of the model's `save_pretrained`, e.g. `max_shard_size`; `save_original_format=False` stores packed tensors,
                which load faster; `requantize=True` FP8 where the model was in FP8. With `push_to_hub` also its options.

        Raises:
            HeaprError: if nothing was pruned yet, the folder cannot be written, is not empty or is the model's own, or the Hub refuses.
        """
        plan, folder = self._pruned_by(), Path(folder)
        if not self._stages.writes(f"folder={str(folder)!r}"):
            return folder
        check_output_is_not_input(folder, self.model.config.name_or_path, argument="folder")
        push_options, save_options = split_push_options(save_options) if push_to_hub else ({}, save_options)
        with replace_folder(folder, overwrite) as temporary:
            self._stages.save(temporary, plan, self.tokenizer, self.report, results, **save_options)
            if self.statistics is not None:
                self.statistics.save(own_folder(temporary) / STATISTICS_NAME, grams=False)  # grams can outweigh it
            if self.recovery_report is not None and self.recovery_report.improved:
                self.recovery_report.add_to(temporary)
        self._stages.remove_fits()
        if push_to_hub:
            push_folder(folder, repo_id or folder.resolve().name, **push_options)
        return folder

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo | None:
        """Uploads what [`~HeaprPruner.save_pretrained`] writes, with its options and those of
        [`~optimum_heapr.hub.push.push_folder`], to `NAME` or `OWNER/NAME`, in one commit. If the Hub refuses, nothing changes there."""
        push_options, save_options = split_push_options(options)
        if not self._stages.writes(f"repo_id={repo_id!r}"):
            return None
        with tempfile.TemporaryDirectory() as folder:
            return push_folder(self.save_pretrained(folder, **save_options), repo_id, **push_options)

    def _pruned_by(self) -> PruningPlan:
        if self.applied_plan is None:
            raise HeaprError(getattr(self.model, BROKEN_OFF, "model: was not pruned yet; call prune() or apply()"))
        return self.applied_plan
