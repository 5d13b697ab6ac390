# Licensed under the Apache License, Version 2.0
"""A model whose weights are spread over processes: measured where they are, and cut from its checkpoint file by file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .loaded import LoadedModel
from .streamed import OffloadedModel
from .tensor_parallel import SHARDING_OPTIONS


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.state import StateFile
    from ..calibration.statistics import AtomicStatistics
    from ..configuration import HeaprConfig
    from ..hub.base_model import BaseModel
    from ..text.samples import CalibrationData


class ShardedModel(OffloadedModel):
    """
    A model that is spread over processes. All of them measure it; one cuts the checkpoint that it was loaded from.

    Args:
        model (`PreTrainedModel`): it stays as it is; it says where its checkpoint is.
        base, model_options: as of [`OffloadedModel`].
    """

    def __init__(self, model: PreTrainedModel, base: BaseModel, model_options: dict[str, Any]):
        super().__init__(model, base, {key: model_options[key] for key in model_options.keys() - SHARDING_OPTIONS})

    def calibrate(
        self,
        data: CalibrationData,
        config: HeaprConfig,
        state: StateFile | None = None,
        keep_grams: bool = True,
        checkpointing: bool = False,
    ) -> AtomicStatistics:
        """As in memory, and by all processes together."""
        return LoadedModel.calibrate(self, data, config, state, keep_grams, checkpointing)
