# Licensed under the Apache License, Version 2.0
"""A model that is never loaded: calibrated layer by layer from its checkpoint, and cut from folder to folder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.streaming import calibrate_streaming
from ..criteria.obs import store_removal_curve
from ..utils.errors import HeaprError
from .loading import source_of
from .saving import write_streaming


if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from transformers import PreTrainedModel

    from ..calibration.layer_state import StateFolder
    from ..calibration.statistics import AtomicStatistics, BlockStatistics
    from ..configuration import HeaprConfig
    from ..planning.plan import PruningPlan
    from ..text.samples import CalibrationData


class StreamedCheckpoint:
    """
    A checkpoint that is measured and cut piece by piece.

    Args:
        model (`PreTrainedModel`): without storage if it is to be calibrated here; it says where the checkpoint is.
        model_options (`dict`): as for [`~optimum_heapr.checkpoints.loading.load_model`]; `offload_folder` is where activations go that
            are past the budget, and matrices; by default a temporary folder of the system.
        activation_memory (`int`, *optional*): bytes of layer inputs in the memory of the host.
    """

    def __init__(self, model: PreTrainedModel, model_options: dict[str, Any], activation_memory: int | None = None):
        self._model, self._activation_memory = model, activation_memory
        self._options = {key: value for key, value in model_options.items() if key != "device_map"}
        self._folder = self._options.pop("offload_folder", None)

    def calibrate(
        self, data: CalibrationData, config: HeaprConfig, state: StateFolder | None = None, keep_grams: bool = True
    ) -> AtomicStatistics:
        """[`~optimum_heapr.calibration.streaming.calibrate_streaming`]; of the matrices only what is of use is kept.

        Args:
            data (`CalibrationData`): tokenized samples.
            config (`HeaprConfig`): how to measure, and by which criterion removal curves are made.
            state (`StateFolder`, *optional*): where the run is saved and goes on from. The caller removes it.
            keep_grams (`bool`): keep the matrices, in the folder.
        """

        def finish(path: str, block: BlockStatistics) -> BlockStatistics:
            if config.criterion == "obs":
                store_removal_curve(path, block, config.ridge)
            if not keep_grams:
                block.activation_gram_sum = block.gradient_gram_sum = None
            return block

        source = source_of(self._model, **self._options)
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
            return calibrate_streaming(self._model, source, data, state.path, resumable=True, **options)
        if self._folder is not None:
            Path(self._folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="heapr-", dir=self._folder) as folder:
            return calibrate_streaming(self._model, source, data, Path(folder), **options)

    def save(
        self,
        folder: Path,
        plan: PruningPlan,
        statistics: AtomicStatistics | None,
        data: CalibrationData | None = None,
        results: Sequence[EvalResult] = (),
        max_shard_size: int | str = "5GB",
        save_original_format: bool = True,
        **unknown: Any,
    ) -> None:
        """Writes the pruned model into an empty folder, file by file; `data` is what compensation over blocks is fitted to.

        Raises:
            HeaprError: if packed tensors or something else is asked for that needs the model in memory.
        """
        if unknown or not save_original_format:
            option = next(iter(unknown), "save_original_format")
            raise HeaprError(
                f"{option}: is for a model in memory, and this one is cut file by file; leave it out, or load it with memory='plain'"
            )
        write_streaming(
            self._model.config._name_or_path,
            plan,
            folder,
            statistics,
            self._options,
            results,
            max_shard_size,
            data,
            self._activation_memory,
        )
