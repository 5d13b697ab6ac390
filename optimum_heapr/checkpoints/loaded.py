# Licensed under the Apache License, Version 2.0
"""A model that is in memory: measured, cut and written where it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..budget import plan_for
from ..calibration.processes import connected_processes
from ..calibration.runner import calibrate, frozen_in_evaluation_mode
from ..calibration.state import StateFile
from ..criteria.obs import with_removal_curve
from ..experts import find_expert_blocks
from ..hub.base_model import BaseModel
from ..hub.statistics import load_statistics
from ..layerwise.decoder import Decoder
from ..report.content import build_report
from ..report.jump import jump_text, jumped
from ..report.observation import Workload, observe
from ..surgery.apply import apply_plan, check_compensation, check_plan
from ..surgery.fit_files import remove_fits, say_unused_fits
from ..surgery.rectangles import best_rectangle
from ..text.samples import load_calibration_data
from ..utils.errors import HeaprError
from ..utils.logging import get_logger, say_nothing_to_resume
from ..utils.placement import place
from ..utils.public import public_text
from ..utils.sizes import parse_size
from .culprit import find_culprit
from .orientation import check_orientation, written_as_stored
from .requantizing import check_requantizing
from .requantizing import requantize as put_into_fp8
from .saving import check_form, save_companions


if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..calibration.layer_state import StateFolder
    from ..calibration.statistics import AtomicStatistics
    from ..configuration import HeaprConfig
    from ..planning.plan import PruningPlan
    from ..text.samples import CalibrationData


logger = get_logger(__name__)


class LoadedModel:
    """
    The stages of pruning, from calibration to a folder, for a model in memory; subclasses have them for one that is not.

    Args:
        model (`PreTrainedModel`): it is changed in place.
        base (`BaseModel`, *optional*): what it is called; by default what it was loaded from says.
        model_options (`dict`, *optional*): as for [`~optimum_heapr.checkpoints.loading.load_model`], which loaded it; without
            them it may have been made or changed since.
    """

    state_class: type[StateFile] | type[StateFolder] = StateFile

    def __init__(
        self, model: PreTrainedModel, base: BaseModel | None = None, model_options: dict[str, Any] | None = None
    ):
        self.model = model
        self._base = base
        self._fits_path: Path | None = None
        kept_out = ("device_map", "offload_folder")
        self._options = model_options and {key: value for key, value in model_options.items() if key not in kept_out}

    @property
    def base(self) -> BaseModel:
        """What the model was before it is cut: its name, and what its card says."""
        if self._base is None:
            self._base = BaseModel.of(self.model)
        return self._base

    def writes(self, what: str) -> bool:
        """Whether this process writes what comes of it, and says so if not: of several that are connected the first alone does, as in
        transformers, also where each has a model, or a folder, of its own."""
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            return True
        rank, number = torch.distributed.get_rank(), torch.distributed.get_world_size()
        logger.warning("%s: nothing is written by this process, rank %d of %d; rank 0 writes", what, rank, number)
        return False

    def state(self, path: str | os.PathLike | None, resume: bool, save_every: int) -> StateFile | StateFolder | None:
        """Where a calibration is saved and goes on from, if a path is named.

        Raises:
            HeaprError: if none is, and it was asked for; or as the class of the state.
        """
        if path is not None:
            state = self.state_class(path, resume, save_every)
            if resume and not state.path.exists():
                say_nothing_to_resume("state", state.path)
            return state
        if resume or save_every:
            raise HeaprError(f"state_path=None: resume={resume} and save_every={save_every} need a file; name one")
        return None

    def calibrate(
        self,
        data: CalibrationData,
        config: HeaprConfig,
        state: StateFile | None = None,
        keep_grams: bool = True,
        checkpointing: bool = False,
    ) -> AtomicStatistics:
        """[`~optimum_heapr.calibration.runner.calibrate`], and removal curves if the criterion needs them.

        Args:
            data (`CalibrationData`): tokenized samples.
            config (`HeaprConfig`): how to measure, and by which criterion removal curves are made.
            state (`StateFile`, *optional*): where the run is saved and goes on from. The caller removes it.
            keep_grams (`bool`): not asked for in memory, where matrices are as they were summed.
            checkpointing (`bool`): compute each layer twice, in less memory.
        """
        finish = partial(with_removal_curve, ridge=config.ridge) if config.criterion == "obs" else None
        measured = config.batch_size, config.needs_grams, config.skip_nonfinite
        return calibrate(self.model, data, *measured, state, checkpointing, finish)

    def needs_matrices(self, config: HeaprConfig) -> bool:
        """Whether what comes after calibration takes the matrices, which of several processes the first alone has.

        Raises:
            HeaprError: if it does, and there are several.
        """
        connected = connected_processes() if config.compensates_experts else None
        if connected is not None:
            raise HeaprError(
                f"compensation_scope='expert': takes matrices, and of the {connected.num_processes} processes that call prune() the first "
                "alone would have them; call calibrate() in each, then plan() and apply() in the first, or ask for "
                "compensation_scope='block'"
            )
        return config.compensates_experts

    def measured(
        self, statistics: AtomicStatistics | str | os.PathLike | None, otherwise: AtomicStatistics | None
    ) -> AtomicStatistics:
        """Statistics from wherever they are, if they are of this model.

        Args:
            statistics (`AtomicStatistics` or `str`, *optional*): those that were asked for.
            otherwise (`AtomicStatistics`, *optional*): those that were measured, if none were.

        Raises:
            HeaprError: if there are none, they cannot be read, or they are of another model.
        """
        found = otherwise if statistics is None else load_statistics(statistics)
        if found is None:
            raise HeaprError("statistics=None: nothing was measured yet; call calibrate() or name a statistics file")
        found.check_model(self.model, find_expert_blocks(self.model))
        return found

    def check(self, plan: PruningPlan) -> None:
        """Refuses a plan of another model.

        Raises:
            HeaprError: naming what differs.
        """
        check_orientation(self.model, check_plan(self.model, plan), plan)

    def plan(
        self,
        statistics: AtomicStatistics,
        config: HeaprConfig,
        data: CalibrationData | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> PruningPlan:
        """What stays: looked up, or for some options measured with the model and the text."""
        if config.num_experts == "auto":
            return self.best_rectangle(statistics, config, data, tokenizer)
        return plan_for(self.model, tokenizer, statistics, config, data)

    def best_rectangle(
        self,
        statistics: AtomicStatistics,
        config: HeaprConfig,
        data: CalibrationData | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> PruningPlan:
        """The plan for `num_experts="auto"`: [`~optimum_heapr.surgery.rectangles.best_rectangle`].

        Args:
            statistics (`AtomicStatistics`): of the model.
            config (`HeaprConfig`): what was asked for.
            data (`CalibrationData`, *optional*): what they were measured on, if it is at hand; else it is read again.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): to read it with.
        """
        data = data or load_calibration_data(config, tokenizer)
        place(self.model)
        with frozen_in_evaluation_mode(self.model):
            layers = Decoder(self.model, find_expert_blocks(self.model))
            return best_rectangle(layers, data, statistics, config, accelerator=connected_processes())

    def apply(
        self,
        plan: PruningPlan,
        statistics: AtomicStatistics | None,
        data: CalibrationData | None,
        measured: tuple[PreTrainedTokenizerBase | None, Sequence[str] | None] | None = None,
        fits_path: Path | None = None,
    ) -> dict[str, Any] | None:
        """Cuts the model, and says in a report what that did.

        Args:
            plan (`PruningPlan`): what stays.
            statistics (`AtomicStatistics`, *optional*): for compensation within experts.
            data (`CalibrationData`, *optional*): for compensation over blocks.
            measured (`tuple`, *optional*): tokenizer, and prompts if there are any, to measure before and after.
            fits_path (`Path`, *optional*): as of [`~optimum_heapr.surgery.layer_by_layer.compensate_together`].
        """
        check_compensation(plan, statistics, data)  # before minutes are spent on measuring
        workload = None
        if measured is not None:
            tokenizer, prompts = measured
            place(self.model)  # saved statistics do not need it there
            workload = Workload.of(plan.config, tokenizer, data, prompts, plan.data.get("sha256"))
            if workload is None and prompts is not None:
                logger.warning(
                    "prompts are not completed, as nothing is measured: name an eval_dataset, or calibrate on text that has "
                    "some left over (eval_samples=%d)",
                    plan.config.eval_samples,
                )
        say_unused_fits(plan.config, fits_path)
        self._fits_path = fits_path
        base, before = self.base, observe(self.model, plan.tokens, workload)
        apply_plan(self.model, plan, statistics, data, fits_path)
        written_as_stored(self.model)
        after = observe(self.model, plan.routed_tokens, workload)
        report = build_report(plan, base.name, before, after, workload)
        if jumped(report["loss"]):
            report["loss"]["jump"] = self._culprit(workload, before.losses, after.losses)
            logger.warning("%s", jump_text(report))
        return report

    def remove_fits(self) -> None:
        """Deletes what `fits_path` of [`apply`] kept, once the pruned model is safe."""
        if self._fits_path is not None:
            remove_fits(Path(self._fits_path))

    def _culprit(self, workload: Workload, before: list[float], after: list[float]) -> dict[str, Any]:
        """The layer that made the loss jump, or why it is not known."""
        if self._options is None:
            return {"unknown": "the model was not loaded by from_pretrained, and its unpruned layers are gone"}
        try:
            path = self.model.config._name_or_path
            return find_culprit(self.model, workload, before, after, path, **self._options)
        except HeaprError as error:
            return {"unknown": public_text(str(error))}
        except Exception as error:  # the pruned model is there, and is not thrown away for want of a name
            return {"unknown": public_text(" ".join(f"{type(error).__name__}: {error}".split())[:300])}

    def save(
        self,
        folder: Path,
        plan: PruningPlan,
        tokenizer: PreTrainedTokenizerBase | None,
        report: dict[str, Any] | None,
        results: Sequence[EvalResult] = (),
        *,
        experts_as: str | None = None,
        requantize: bool = False,
        **save_options: Any,
    ) -> None:
        """Writes the pruned model and what stands beside its weights into an empty folder.

        Raises:
            HeaprError: if the checkpoint cannot be loaded with `experts_as`, or not be written in FP8.
        """
        source, options = getattr(self.model.config, "_name_or_path", ""), self._options or {}
        if requantize:
            if not save_options.get("save_original_format", True):
                raise HeaprError(
                    "requantize=True: needs the tensors of one expert each; leave save_original_format out"
                )
            check_requantizing(plan.config, source, plan, **options)
        if experts_as is not None:
            check_form(plan.config, experts_as, self.model)
            if experts_as == "linear" and not save_options.get("save_original_format", True):
                raise HeaprError(
                    "experts_as='linear': needs the tensors of one expert each; leave save_original_format out"
                )
            if plan.config.layout == "variable":
                self.model.config.experts_as = experts_as
        if "max_shard_size" in save_options:
            save_options["max_shard_size"] = parse_size("max_shard_size", str(save_options["max_shard_size"]))
        self.model.save_pretrained(folder, **save_options)
        save_companions(folder, self.model, tokenizer, plan, self.base, report, results)
        if requantize:
            put_into_fp8(folder, plan, source, **options)
