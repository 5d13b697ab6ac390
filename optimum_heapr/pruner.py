# Licensed under the Apache License, Version 2.0
"""`HeaprPruner`: the whole pipeline behind one object. The file to read first.

    model -> calibrate -> AtomicStatistics -> plan -> PruningPlan -> apply -> pruned model -> save

Each step takes the artefact of the one before and can be run on its own, today or in another process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calibration.layer_state import StateFolder
from .calibration.runner import calibrate
from .calibration.state import StateFile
from .calibration.statistics import STATISTICS_NAME, AtomicStatistics
from .checkpoints.loading import choose_memory, hub_options_in, load_measured, options_for_memory
from .checkpoints.saving import save_companions
from .checkpoints.streamed import StreamedCheckpoint
from .configuration import HeaprConfig
from .criteria.obs import store_removal_curves
from .experts import find_expert_blocks
from .hub.base_model import BaseModel
from .hub.push import push_folder, split_push_options
from .hub.statistics import load_statistics
from .planning.plan import PruningPlan
from .report.content import build_report, without_measurements
from .report.observation import Workload, observe
from .surgery.apply import apply_plan, check_compensation, check_plan
from .surgery.feasibility import check_feasible
from .text.samples import load_calibration_data
from .utils.errors import HeaprError
from .utils.files import replace_folder
from .utils.logging import get_logger
from .utils.placement import place
from .utils.positions import warn_of_positions
from .utils.sizes import parse_size


if TYPE_CHECKING:
    from datasets import Dataset
    from huggingface_hub import CommitInfo, EvalResult
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .recovery.configuration import RecoveryConfig
    from .recovery.report import RecoveryReport
    from .text.samples import CalibrationData


logger = get_logger(__name__)


class HeaprPruner:
    """
    Prunes a Mixture-of-Experts model at the granularity of atomic experts.

    Args:
        model (`PreTrainedModel`): the model to prune; it is changed in place by [`~HeaprPruner.prune`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed to calibrate on text, and saved beside the model.
        config (`HeaprConfig`, *optional*): how to prune; defaults to `HeaprConfig()`.

    Raises:
        HeaprError: if the model has no routed experts that can be pruned exactly, or was pruned already.

    Example:

    ```python
    from optimum_heapr import HeaprConfig, HeaprPruner

    config = HeaprConfig(ratio=0.25, dataset="demo", num_samples=16, seq_length=256)
    pruner = HeaprPruner.from_pretrained("demo", config=config)
    model = pruner.prune()
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: HeaprConfig | None = None,
    ):
        find_expert_blocks(model)  # refuses what cannot be pruned before anything is spent on it
        self.model = model
        self.tokenizer = tokenizer
        self.config = HeaprConfig.checked(config)
        self.statistics: AtomicStatistics | None = None
        self.calibration_data: CalibrationData | None = None
        self.applied_plan: PruningPlan | None = None
        self.report: dict[str, Any] | None = None
        self.recovery_report: RecoveryReport | None = None
        self.base: BaseModel | None = None
        self.memory = "plain"
        self._checkpoint: StreamedCheckpoint | None = None  # of a model that is not cut in memory

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
        """Loads a model and its tokenizer, and statistics that were measured before.

        Where `config` names no dataset and none are given, `statistics.safetensors` beside the model is used. Of a model
        that was pruned already, the base model that its card names is loaded then.

        Args:
            model (`str`): a folder, the name of a repository on the Hub, or `demo` for the embedded model.
            config (`HeaprConfig`, *optional*): how to prune.
            statistics (`AtomicStatistics` or `str`, *optional*): a file, or a folder or repository that holds
                `statistics.safetensors`, such as that of a pruned model.
            memory (`str`): `plain` loads the model; `offload` leaves what does not fit on the host or the disk, in
                `offload_folder`; `streaming` never loads it: it is calibrated layer by layer; `auto` decides from the
                memory there is. Unless it is `plain`, [`~HeaprPruner.save_pretrained`] cuts the checkpoint file by file.
            activation_memory (`int` or `str`, *optional*): for `streaming`, how much of the memory of the host, e.g. `"8GB"`,
                the inputs of all layers may take before they go to `offload_folder`; by default a quarter of what is free.
            model_options: passed to `from_pretrained` of the auto classes: `device_map`, `dtype`, `revision`, `token`,
                `trust_remote_code`, …; `dequantize=True` turns quantized weights into floating-point numbers.

        Raises:
            HeaprError: if the model cannot be found, has an unknown type, or cannot be pruned, or if the statistics cannot be
                read or are of another model.
        """
        config = HeaprConfig.checked(config)
        budget = None if activation_memory is None else parse_size("activation_memory", str(activation_memory))
        if memory not in ("plain", "offload", "streaming"):
            memory, estimate = choose_memory(model, config, memory, budget, **model_options)
            logger.info("%s", estimate or memory)
        options = options_for_memory(memory, model_options)
        loaded, tokenizer, statistics = load_measured(model, statistics, reuse=config.dataset is None, **options)
        pruner = cls(loaded, tokenizer, config)
        pruner.base = BaseModel.of(loaded, hub_options_in(model_options))
        pruner.statistics, pruner.memory = statistics, memory
        if memory != "plain":
            pruner._checkpoint = StreamedCheckpoint(loaded, model_options, budget)
        return pruner

    def check(self, config: HeaprConfig | None = None) -> None:
        """Refuses a layout, an alignment, a uniform ratio or a protection that this model cannot have, before calibration.

        Args:
            config (`HeaprConfig`, *optional*): defaults to `self.config`.

        Raises:
            HeaprError: naming what is possible.
        """
        check_feasible(self.model, config or self.config)

    def calibrate(
        self,
        dataset: HeaprConfig | Dataset | str | None = None,
        state_path: str | os.PathLike | None = None,
        resume: bool = False,
        save_every: int = 0,
        keep_state: bool = False,
        checkpointing: bool = False,
        keep_grams: bool = True,
    ) -> AtomicStatistics:
        """Measures the statistics of every atomic expert; they serve for any ratio and criterion.

        With criterion `obs` the removal curves are computed as well, so that each plan is a look-up.

        Args:
            dataset (`HeaprConfig`, `Dataset` or `str`, *optional*): a config whose calibration part is used in place of
                `self.config`, or data in place of `config.dataset`: a local path, a name on the Hub, or a
                `datasets.Dataset` with a column `text`, `messages` or `input_ids`.
            state_path (`str`, *optional*): file that lets the run go on if it is interrupted: it is written every
                `save_every` micro-batches, and when SIGTERM or Ctrl-C arrives. With `memory="streaming"` a folder, written
                after each layer.
            resume (`bool`): go on from the file, if it exists; the statistics are those of an unbroken run.
            save_every (`int`): micro-batches between two savings; 0 saves only when interrupted.
            keep_state (`bool`): leave the file at the end, to be removed once the statistics are safe.
            checkpointing (`bool`): compute each layer twice and keep less for the backward; always so with
                `memory="offload"`, and for a model whose weights `device_map` has offloaded.
            keep_grams (`bool`): with `memory="streaming"`, keep the matrices of second-order statistics, on the disk. Without
                them there are removal curves, but no compensation.

        Returns:
            `AtomicStatistics`: also kept as `self.statistics`.

        Raises:
            HeaprError: if the data is missing or empty or too short, a loss or gradient is not finite, or the state is
                of another run.
        """
        if state_path is None and (resume or save_every):
            raise HeaprError(f"state_path=None: resume={resume} and save_every={save_every} need a file; name one")
        config = dataset if isinstance(dataset, HeaprConfig) else self.config
        state_class = StateFolder if self.memory == "streaming" else StateFile
        state = None if state_path is None else state_class(state_path, resume, save_every)
        data = load_calibration_data(config, self.tokenizer, None if dataset is config else dataset)
        warn_of_positions(self.model, data.samples)
        self.calibration_data = data
        if self.memory == "streaming":
            self.statistics = self._checkpoint.calibrate(data, config, state, keep_grams)
        else:
            checkpointing = checkpointing or self.memory == "offload"
            self.statistics = calibrate(
                self.model, data, config.batch_size, config.needs_grams, config.skip_nonfinite, state, checkpointing
            )
            if config.criterion == "obs":
                store_removal_curves(self.statistics, config.ridge)
        if state is not None and not keep_state:
            state.remove()
        return self.statistics

    def plan(self, statistics: AtomicStatistics | str | os.PathLike | None = None, **changes: Any) -> PruningPlan:
        """Decides what stays, without touching the model.

        Args:
            statistics (`AtomicStatistics` or `str`, *optional*): defaults to those of the last [`~HeaprPruner.calibrate`].
            changes: options of `HeaprConfig` that differ from `self.config`, e.g. `ratio=0.4`.

        Raises:
            HeaprError: if there are no statistics, they are of another model, or the ratio cannot be reached.
        """
        statistics = self.statistics if statistics is None else load_statistics(statistics)
        if statistics is None:
            raise HeaprError("statistics=None: nothing was measured yet; call calibrate() or name a statistics file")
        statistics.check_model(self.model, find_expert_blocks(self.model))
        config = self.config.replace(**changes)
        if config.criterion == "obs":
            store_removal_curves(statistics, config.ridge)  # the next ratio is a look-up, also in what is saved
        return PruningPlan.build(statistics, config)

    def apply(
        self,
        plan: PruningPlan | str | os.PathLike,
        statistics: AtomicStatistics | str | os.PathLike | None = None,
        measure: bool = False,
        prompts: Sequence[str] | None = None,
    ) -> PreTrainedModel:
        """Cuts the model in place and returns it; `self.report` then says what that did.

        With `memory="streaming"` or `"offload"` its weights are not here to be cut: the plan is checked and kept, the model
        returned as it is, and [`~HeaprPruner.save_pretrained`] cuts the checkpoint. Nothing is measured then.

        Args:
            plan (`PruningPlan` or `str`): what stays.
            statistics (`AtomicStatistics` or `str`, *optional*): needed if the plan asks for compensation within experts;
                defaults to those of the last [`~HeaprPruner.calibrate`]. Over blocks, the text is gone through again.
            measure (`bool`): measure the model before and after, as `eval_dataset` and `eval_samples` of the plan's config
                say, for the report.
            prompts (`Sequence[str]`, *optional*): texts to complete before and after, in place of beginnings of that text.

        Raises:
            HeaprError: if the plan was made for another model, asks for compensation without the statistics for it, or the
                text to measure on is missing.
        """
        plan = plan if isinstance(plan, PruningPlan) else PruningPlan.load(plan)
        statistics = self.statistics if statistics is None else load_statistics(statistics)
        if self._checkpoint is not None:
            plan.check_shapes(
                {block.path: (block.num_experts, block.width) for block in find_expert_blocks(self.model)}
            )
            check_compensation(plan, statistics, self._text_of(plan))
            self.applied_plan, self.statistics = plan, statistics
            return self.model
        if measure:
            check_plan(self.model, plan)  # before minutes are spent on it
            place(self.model)  # saved statistics do not need it there
        data = self._text_of(plan)
        base = self.base or BaseModel.of(self.model)
        workload = Workload.of(plan.config, self.tokenizer, self.calibration_data, prompts) if measure else None
        before = observe(self.model, plan, workload)
        apply_plan(self.model, plan, statistics, data)
        self.applied_plan = plan
        self.report = build_report(plan, base.name, before, observe(self.model, plan, workload), workload)
        return self.model

    def _text_of(self, plan: PruningPlan) -> CalibrationData | None:
        """The calibration text; read again if compensation over blocks needs it."""
        if plan.config.compensates_blocks and self.calibration_data is None:
            self.calibration_data = load_calibration_data(plan.config, self.tokenizer)
        return self.calibration_data

    def prune(self, prompts: Sequence[str] | None = None, **changes: Any) -> PreTrainedModel:
        """Calibrates (unless that was done), plans, measures and applies: the whole job.

        Args:
            prompts (`Sequence[str]`, *optional*): as for [`~HeaprPruner.apply`].
            changes: options of `HeaprConfig` that differ from `self.config`.

        Returns:
            `PreTrainedModel`: the pruned model, the same object as `self.model`.
        """
        config = self.config.replace(**changes)
        self.check(config)
        if self.statistics is None:
            self.calibrate(config, keep_grams=config.compensates_experts)
        return self.apply(self.plan(**changes), measure=True, prompts=prompts)

    def recover(
        self,
        dataset: Dataset | str | None = None,
        config: RecoveryConfig | None = None,
        teacher: PreTrainedModel | str | os.PathLike | None = None,
        **options: Any,
    ) -> RecoveryReport:
        """Trains the pruned model with LoRA; the result is merged into `self.model` if it is better on held-out text.

        Args:
            dataset (`Dataset` or `str`, *optional*): training text, as for [`~HeaprPruner.calibrate`]; `config.dataset` if none.
            config (`RecoveryConfig`, *optional*): what is trained, and how; its defaults if there is none.
            teacher (`PreTrainedModel` or `str`, *optional*): the unpruned model, for distillation and for the report; one
                that is handed over as an object may be cut.
            options: `state_path` (`str`), a folder that lets the run go on if it is interrupted; `resume` (`bool`), go on
                from it; `adapter_folder` (`str`), where the adapter is written before it is merged.

        Returns:
            `RecoveryReport`: the loss of each stage, and whether it improved; also kept as `self.recovery_report`.

        Raises:
            HeaprError: if nothing was pruned yet, or as [`~optimum_heapr.recovery.runner.recover`].
        """
        from .recovery.session import recover_in_memory

        plan = self.applied_plan
        if plan is None:
            raise HeaprError("model: was not pruned yet; call prune() or apply() first")
        self.model, self.recovery_report = recover_in_memory(
            self.model, self.tokenizer, dataset, config, teacher, plan, **options
        )
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
        """Writes the pruned model, its tokenizer and generation config, `heapr_config.json`, plan, report and model card.

        Args:
            folder (`str`): appears whole or not at all.
            overwrite (`bool`): replace a folder that is not empty.
            push_to_hub (`bool`): upload the folder as well, to `repo_id`.
            repo_id (`str`, *optional*): defaults to the name of the folder.
            results (`Sequence[EvalResult]`): what was measured, for the card; see
                [`~optimum_heapr.hub.card.perplexity_result`].
            save_options: passed to the model's `save_pretrained`, e.g. `max_shard_size`; `save_original_format=False`
                stores the packed tensors, which load faster. With `push_to_hub` also the options of
                [`~HeaprPruner.push_to_hub`].

        Raises:
            HeaprError: if nothing was pruned yet, the folder cannot be written or is not empty, or the Hub refuses.
        """
        push_options, save_options = split_push_options(save_options) if push_to_hub else ({}, save_options)
        if self.applied_plan is None:
            raise HeaprError("model: was not pruned yet; call prune() or apply() first")
        if "max_shard_size" in save_options:
            save_options["max_shard_size"] = parse_size("max_shard_size", str(save_options["max_shard_size"]))
        folder = Path(folder)
        with replace_folder(folder, overwrite) as temporary:
            if self._checkpoint is not None:
                plan, data = self.applied_plan, self.calibration_data
                self._checkpoint.save(temporary, plan, self.statistics, data, results, **save_options)
            else:
                self.model.save_pretrained(temporary, **save_options)
                base = self.base or BaseModel.of(self.model)
                save_companions(temporary, self.model, self.tokenizer, self.applied_plan, base, self.report, results)
            if self.statistics is not None:
                self.statistics.save(temporary / STATISTICS_NAME, grams=False)  # matrices can outweigh the model
            if self.recovery_report is not None and self.recovery_report.improved:
                self.recovery_report.add_to(temporary)
        if push_to_hub:
            push_folder(folder, repo_id or folder.resolve().name, **push_options)
        return folder

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Uploads what [`~HeaprPruner.save_pretrained`] writes, in one commit.

        Args:
            repo_id (`str`): `NAME` or `OWNER/NAME` of the repository.
            options: `private`, `token`, `revision`, `commit_message`, `create_pr` and `with_statistics`, as for
                [`~optimum_heapr.hub.push.push_folder`]; others are for [`~HeaprPruner.save_pretrained`], e.g. `results`.

        Raises:
            HeaprError: if nothing was pruned yet, or the Hub refuses; then the repository holds what it held before.
        """
        push_options, save_options = split_push_options(options)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_options)
            return push_folder(folder, repo_id, **push_options)
