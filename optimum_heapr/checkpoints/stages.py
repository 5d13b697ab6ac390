# Licensed under the Apache License, Version 2.0
"""From the name of a model to the object that measures, cuts and writes it, in the memory there is."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from ..budget import check_in_memory
from ..calibration.sharing import check_sharding
from ..configuration import HeaprConfig
from ..hub.base_model import BaseModel
from ..utils.errors import HeaprError
from ..utils.logging import get_logger, say_once
from ..utils.sharded import is_sharded
from ..utils.sizes import parse_size
from .loaded import LoadedModel
from .loading import choose_memory, hub_options_in, load_measured, options_for_memory
from .sharded import ShardedModel
from .streamed import OffloadedModel, StreamedCheckpoint
from .tensor_parallel import check_spreading, is_spread


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..calibration.statistics import AtomicStatistics


logger = get_logger(__name__)


class Loaded(NamedTuple):
    """What [`load_stages`] gives.

    Attributes:
        stages (`LoadedModel`): the model, and how it is measured, cut and written.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): if the model has one.
        statistics (`AtomicStatistics`, *optional*): that were measured before.
    """

    stages: LoadedModel
    tokenizer: PreTrainedTokenizerBase | None
    statistics: AtomicStatistics | None


def stages_of(model: PreTrainedModel) -> LoadedModel:
    """How a model is measured, cut and written that others have loaded or made.

    Raises:
        HeaprError: if it is wrapped or spread over processes in a way that cannot be measured.
    """
    check_sharding(model)
    return ShardedModel(model) if is_sharded(model) else LoadedModel(model)


def load_stages(
    name: str | os.PathLike,
    config: HeaprConfig | None,
    statistics: AtomicStatistics | str | os.PathLike | None = None,
    memory: str = "plain",
    activation_memory: int | str | None = None,
    **model_options: Any,
) -> Loaded:
    """Loads a model as `memory` says, or as the estimate does where that is `auto`.

    Args:
        name, statistics, memory, activation_memory, model_options: as for
            [`~optimum_heapr.HeaprPruner.from_pretrained`].
        config (`HeaprConfig`, *optional*): its calibration part is used for the estimate; without a dataset, statistics beside the model
            are used.

    Raises:
        HeaprError: if the model or the statistics cannot be loaded, `memory` or `activation_memory` is unknown, or
            `max_loss_increase` is asked for and the model will not be in memory.
    """
    config = HeaprConfig.checked(config)
    for option in dataclasses.fields(config):
        if option.name in model_options:
            value = f"{option.name}={model_options[option.name]!r}"
            raise HeaprError(f"{value}: is an option of HeaprConfig; pass config=HeaprConfig({value})")
    budget = None if activation_memory is None else parse_size("activation_memory", str(activation_memory))
    check_spreading(memory, model_options)
    if memory not in ("plain", "offload", "streaming"):
        memory, estimate = choose_memory(name, config, memory, budget, **model_options)
        logger.info("%s", estimate or memory)
    if budget is not None and memory != "streaming" and not (memory == "offload" and config.compensates_blocks):
        say_once(f"activation_memory={activation_memory!r}: has no use with memory={memory!r}")
    spread = is_spread(model_options)
    check_in_memory(config, memory == "plain" and not spread)
    options = options_for_memory(memory, model_options)
    model, tokenizer, measured = load_measured(name, statistics, reuse=config.dataset is None, **options)
    base = BaseModel.of(model, hub_options_in(model_options))
    if spread:
        check_sharding(model)
        return Loaded(ShardedModel(model, base, model_options), tokenizer, measured)
    if memory == "plain":
        return Loaded(LoadedModel(model, base, model_options), tokenizer, measured)
    stages = StreamedCheckpoint if memory == "streaming" else OffloadedModel
    return Loaded(stages(model, base, model_options, budget), tokenizer, measured)
