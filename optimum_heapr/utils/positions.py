# Licensed under the Apache License, Version 2.0
"""How long a text a model was made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from .logging import get_logger, is_main_process


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


logger = get_logger(__name__)

_warned: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()
"""Lengths that were warned of, by a part that a model keeps where it is wrapped, as for an adapter."""


def positions_of(model: PreTrainedModel) -> int | None:
    """Tokens that a model has positions for; `None` where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def warn_of_positions(model: PreTrainedModel, samples: Sequence[torch.Tensor]) -> None:
    """Warns of samples that are longer: with rotary positions such a model runs, far from what it was trained for.

    Once for a model, also where it is measured before and after something, unless samples are longer yet.
    """
    room, longest, part = positions_of(model), max(map(len, samples), default=0), model.get_input_embeddings()
    if room is not None and longest > _warned.get(part, room) and is_main_process():
        _warned[part] = longest
        logger.warning(
            "seq_length: samples have up to %d tokens, and the model has positions for %d; what it does behind those says "
            "little of it. Lower seq_length to %d.",
            longest,
            room,
            room,
        )
