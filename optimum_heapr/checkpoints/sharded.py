# Licensed under the Apache License, Version 2.0
"""A model whose weights are spread over processes: measured where they are, and cut from its checkpoint file by file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..budget import check_in_memory
from ..fingerprint import check_same_model, hash_of_samples, model_fingerprint
from ..layerwise.layers import StreamedModel
from ..utils.errors import HeaprError
from .loaded import LoadedModel
from .loading import load_model, source_of
from .streamed import OffloadedModel
from .tensor_parallel import SHARDING_OPTIONS


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..calibration.state import StateFile
    from ..calibration.statistics import AtomicStatistics
    from ..configuration import HeaprConfig
    from ..hub.base_model import BaseModel
    from ..planning.plan import PruningPlan
    from ..text.samples import CalibrationData


class ShardedModel(OffloadedModel):
    """
    A model that is spread over processes. All of them measure it; one cuts the checkpoint that it was loaded from.

    Args:
        model (`PreTrainedModel`): it stays as it is; it says where its checkpoint is.
        base (`BaseModel`, *optional*): as of [`LoadedModel`].
        model_options (`dict`, *optional*): as of [`OffloadedModel`]; without them the model was made or changed by others, and the
            checkpoint is compared with what was measured.
    """

    def __init__(
        self, model: PreTrainedModel, base: BaseModel | None = None, model_options: dict[str, Any] | None = None
    ):
        options = model_options or {}
        super().__init__(model, base, {key: options[key] for key in options.keys() - set(SHARDING_OPTIONS)})
        self._is_ours = model_options is not None

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

    def plan(
        self,
        statistics: AtomicStatistics,
        config: HeaprConfig,
        data: CalibrationData | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> PruningPlan:
        """As in memory, but for what is measured: one process could not.

        Raises:
            HeaprError: if a loss is asked for in place of a size.
        """
        check_in_memory(config, False)
        return super().plan(statistics, config, data, tokenizer)

    def check(self, plan: PruningPlan) -> None:
        """Refuses a plan of another model, and a checkpoint of another one than was measured.

        Raises:
            HeaprError: naming what differs.
        """
        super().check(plan)
        if self._is_ours:
            return
        name = self.model.config._name_or_path
        if not name:
            raise HeaprError(
                "model: is spread over processes and was not loaded from a checkpoint, which would be cut; save it with "
                "save_pretrained, and load it from there"
            )
        skeleton, _ = load_model(name, skeleton=True, **self._options)
        source = source_of(skeleton, **self._options)
        identity = model_fingerprint(skeleton, [source.expert(block, 0) for block in source.blocks])
        identity["weights"] = hash_of_samples(StreamedModel(skeleton, source, torch.device("cpu")).all_samples())
        try:
            check_same_model(plan.model, identity, "plan")
        except HeaprError as error:
            raise HeaprError(
                f"model={name!r}: is spread over processes, so that this checkpoint would be cut, and it is not what was measured "
                f"({error}); save the model with save_pretrained, and load it from there"
            ) from error
