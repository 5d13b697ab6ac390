# Licensed under the Apache License, Version 2.0
"""A model that is never whole in memory: measured layer by layer, and cut from checkpoint to checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.layer_state import StateFolder
from ..calibration.processes import connected_processes
from ..calibration.streaming import calibrate_streaming
from ..criteria.obs import with_removal_curve
from ..experts import find_expert_blocks
from ..layerwise.layers import StreamedModel
from ..surgery.apply import check_compensation
from ..surgery.fit_files import say_unused_fits
from ..surgery.rectangles import best_rectangle
from ..text.samples import load_calibration_data
from ..utils.errors import HeaprError
from ..utils.logging import get_logger
from ..utils.placement import default_device
from ..utils.temporary import TemporaryFolder
from .loaded import LoadedModel
from .loading import load_model, source_of
from .orientation import check_orientation
from .saving import fit_checkpoint, write_streaming


if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..calibration.state import StateFile
    from ..calibration.statistics import AtomicStatistics, BlockStatistics
    from ..configuration import HeaprConfig
    from ..hub.base_model import BaseModel
    from ..planning.plan import PruningPlan
    from ..surgery.fitted import FittedFiles
    from ..text.samples import CalibrationData


logger = get_logger(__name__)


class OffloadedModel(LoadedModel):
    """
    A model whose weights are brought in layer by layer by hooks: measured through them, and cut file by file.

    Args:
        model (`PreTrainedModel`): it stays as it is; it says where its checkpoint is.
        base (`BaseModel`): what it is called.
        model_options (`dict`): as for [`~optimum_heapr.checkpoints.loading.load_model`]; `offload_folder` is where activations
            go that are past the budget, and matrices; by default a temporary folder of the system.
        activation_memory (`int`, *optional*): bytes of layer inputs in the memory of the host.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: BaseModel,
        model_options: dict[str, Any],
        activation_memory: int | None = None,
    ):
        super().__init__(model, base, model_options)
        self._activation_memory, self._folder = activation_memory, model_options.get("offload_folder")
        self._statistics: AtomicStatistics | None = None
        self._fitted: FittedFiles | None = None
        self._work: TemporaryFolder | None = None

    def calibrate(
        self,
        data: CalibrationData,
        config: HeaprConfig,
        state: StateFile | None = None,
        keep_grams: bool = True,
        checkpointing: bool = True,
    ) -> AtomicStatistics:
        """As in memory; each layer is always computed twice, so that no weights stay for the backward."""
        return super().calibrate(data, config, state, keep_grams, checkpointing=True)

    def check(self, plan: PruningPlan) -> None:
        """Refuses a plan of another model, as far as shapes tell.

        Raises:
            HeaprError: naming what differs.
        """
        blocks = find_expert_blocks(self.model)
        plan.check_shapes({block.path: (block.num_experts, block.width) for block in blocks})
        check_orientation(self.model, blocks, plan)

    def best_rectangle(
        self,
        statistics: AtomicStatistics,
        config: HeaprConfig,
        data: CalibrationData | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> PruningPlan:
        """As in memory, from the checkpoint layer by layer."""
        data = data or load_calibration_data(config, tokenizer)
        skeleton, _ = load_model(self.model.config._name_or_path, skeleton=True, **self._options)
        layers = StreamedModel(skeleton, source_of(skeleton, **self._options), default_device())
        return best_rectangle(layers, data, statistics, config, self._activation_memory, connected_processes())

    def apply(
        self,
        plan: PruningPlan,
        statistics: AtomicStatistics | None,
        data: CalibrationData | None,
        measured: tuple | None = None,
        fits_path: Path | None = None,
    ) -> None:
        """Makes what [`save`] cuts the checkpoint with: the weights are not here to be cut, and nothing is measured.

        Raises:
            HeaprError: if the plan asks for compensation without the statistics or the text for it.
        """
        check_compensation(plan, statistics, data)
        if measured is not None and measured[1] is not None:
            logger.warning("prompts are not completed, as nothing is measured: the weights are not in memory")
        say_unused_fits(plan.config, fits_path)
        self._statistics, self._fits_path, self._fitted = statistics, fits_path, None
        if plan.config.compensates_blocks:
            self._work = TemporaryFolder(self._folder)
            given = data, self._activation_memory, fits_path, self._options
            self._fitted = fit_checkpoint(self.model.config._name_or_path, plan, self._work.path, *given)

    def save(
        self,
        folder: Path,
        plan: PruningPlan,
        tokenizer: PreTrainedTokenizerBase | None,
        report: dict[str, Any] | None,
        results: Sequence[EvalResult] = (),
        *,
        max_shard_size: int | str = "5GB",
        save_original_format: bool = True,
        experts_as: str = "packed",
        requantize: bool = False,
        **unknown: Any,
    ) -> None:
        """Writes the pruned model into an empty folder, file by file; tokenizer and report are made from the checkpoint.

        Raises:
            HeaprError: if packed tensors or something else is asked for that needs the model in memory.
        """
        if unknown or not save_original_format:
            option = next(iter(unknown), "save_original_format")
            raise HeaprError(
                f"{option}: is for a model in memory, and this one is cut file by file; leave it out, or load it with memory='plain'"
            )
        write_streaming(
            self.model.config._name_or_path,
            plan,
            folder,
            statistics=self._statistics,
            fitted=self._fitted,
            results=results,
            max_shard_size=max_shard_size,
            experts_as=experts_as,
            requantize=requantize,
            model_options=self._options,
        )


class StreamedCheckpoint(OffloadedModel):
    """A model without storage, as [`OffloadedModel`], that is measured from its checkpoint layer by layer."""

    state_class = StateFolder

    def calibrate(
        self,
        data: CalibrationData,
        config: HeaprConfig,
        state: StateFolder | None = None,
        keep_grams: bool = True,
        checkpointing: bool = True,
    ) -> AtomicStatistics:
        """[`~optimum_heapr.calibration.streaming.calibrate_streaming`]; of the matrices only what is of use is kept.

        Args:
            data (`CalibrationData`): tokenized samples.
            config (`HeaprConfig`): how to measure, and by which criterion removal curves are made.
            state (`StateFolder`, *optional*): where the run is saved and goes on from. The caller removes it.
            keep_grams (`bool`): keep the matrices, in the folder.
            checkpointing (`bool`): not asked for: each layer is computed twice in any case.
        """

        def finish(path: str, block: BlockStatistics) -> BlockStatistics:
            if config.criterion == "obs":
                block = with_removal_curve(path, block, config.ridge)
            return block if keep_grams else block.without_grams()

        source = source_of(self.model, **self._options)
        options = {
            "batch_size": config.batch_size,
            "gram": config.needs_grams,
            "skip_nonfinite": config.skip_nonfinite,
            "activation_memory": self._activation_memory,
            "finish": finish,
            "kept": {"criterion": config.criterion, "ridge": config.ridge, "grams": keep_grams},
        }
        if state is not None:
            state.path.mkdir(parents=True, exist_ok=True)
            return calibrate_streaming(self.model, source, data, state.path, resumable=True, **options)
        work = TemporaryFolder(self._folder)
        try:
            statistics = calibrate_streaming(self.model, source, data, work.path, **options)
        except BaseException:
            work.remove()
            raise
        if statistics.has_grams:
            statistics.files = work
        else:
            work.remove()
        return statistics
