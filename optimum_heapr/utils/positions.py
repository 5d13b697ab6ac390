# Licensed under the Apache License, Version 2.0
"""How long a text a model was made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .logging import get_logger, is_main_process


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


logger = get_logger(__name__)


def positions_of(model: PreTrainedModel) -> int | None:
    """Tokens that a model has positions for; `None` where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def warn_of_positions(model: PreTrainedModel, samples: Sequence[torch.Tensor]) -> None:
    """Warns of samples that are longer: with rotary positions such a model runs, far from what it was trained for."""
    room, longest = positions_of(model), max(map(len, samples), default=0)
    if room is not None and longest > room and is_main_process():
        logger.warning(
            "seq_length: samples have up to %d tokens, and the model has positions for %d; what it does behind those says "
            "little of it. Lower seq_length to %d.",
            longest,
            room,
            room,
        )
