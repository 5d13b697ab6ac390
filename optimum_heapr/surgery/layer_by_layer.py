# Licensed under the Apache License, Version 2.0
"""All blocks of a model, one layer after another: what they are called with goes in, what they become comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..calibration.tap import switched_experts
from ..layerwise.activations import ActivationStore
from ..layerwise.decoder import replaced_forwards
from ..layerwise.memory import activation_budget
from ..layerwise.walk import LayerWalk
from ..utils.logging import get_logger, progress
from .block_compensation import fit_block
from .block_inputs import BlockInputs, watched_blocks
from .rerouting import Rerouting


if TYPE_CHECKING:
    from ..experts import ExpertBlock
    from ..layerwise.decoder import Decoder
    from ..planning.plan import PruningPlan
    from ..text.samples import CalibrationData
    from .fitted import FittedBlock


logger = get_logger(__name__)


@torch.no_grad()
def compensate_together(
    decoder: Decoder,
    data: CalibrationData,
    plan: PruningPlan,
    folder: Path,
    keep: Callable[[ExpertBlock, FittedBlock], None],
    activation_memory: int | None = None,
) -> None:
    """Fits all blocks of an unpruned model, from the first layer to the last, and fills in `plan.compensation`.

    Args:
        decoder (`Decoder`): the layers; only one needs its weights at a time.
        data (`CalibrationData`): tokenized samples, `plan.config.batch_size` of which make a micro-batch.
        plan (`PruningPlan`): what stays.
        folder (`Path`): exists; takes the inputs of a layer past the budget.
        keep (`Callable`): is given each block and what becomes of it, and may change it: no other layer sees that.
        activation_memory (`int`, *optional*): bytes of layer inputs that are kept in the memory of the host; by default a
            quarter of what is free.

    Raises:
        HeaprError: if a layer needs more than the hidden states of the one before.
    """
    own = data.fingerprint
    if plan.data and plan.data["sha256"] != own["sha256"]:
        logger.warning(
            "The model is compensated on other text than it was measured on: %s tokens of %s in place of %s of %s",
            *(part for text in (own, plan.data) for part in (text["num_tokens"], text["source"])),
        )
    batches = dict(enumerate(data.micro_batches(plan.config.batch_size)))
    walk = LayerWalk(decoder, batches, ActivationStore(folder, activation_budget(activation_memory)))
    with decoder.rest():
        walk.capture(batches)
    rerouting = Rerouting.of(decoder.model, decoder.blocks, plan)
    last = max(number for number in range(len(decoder.layers)) if decoder.blocks_of(number))
    for number in progress(range(last + 1), desc="Compensating", unit="layer"):
        blocks = decoder.blocks_of(number)
        with decoder.layer(number) as layer:
            # The experts of calibration take any width and type.
            with switched_experts(decoder.model, blocks), watched_blocks(decoder.model, blocks) as watched:
                for index, batch in batches.items():
                    for inputs in watched.values():
                        inputs.counts = batch["attention_mask"].bool().flatten()
                    walk.forward(number, layer, index)
                if rerouting is not None:
                    _reroute(rerouting, walk, number, layer, watched)
            walk.drop("hidden", number)
            for block in blocks:
                fitted = fit_block(block, watched.pop(block.path), plan.kept[block.path], plan.config.ridge)
                errors = (fitted.error_before, fitted.error_after)
                plan.compensation[block.path] = [errors] * block.num_experts
                keep(block, fitted)
    walk.drop("hidden", last + 1)


def _reroute(
    rerouting: Rerouting, walk: LayerWalk, number: int, layer: torch.nn.Module, watched: dict[str, BlockInputs]
) -> None:
    """Shows to `watched` how the pruned model routes the tokens of a layer. What its experts would give is left out."""
    blocks = walk.decoder.blocks_of(number)

    def nothing(index: int) -> Callable:
        return lambda hidden, *inputs, **named: torch.zeros_like(hidden)

    with rerouting.active(blocks), replaced_forwards([block.module for block in blocks], nothing):
        for index, batch in walk.batches.items():
            for inputs in watched.values():
                inputs.is_rerouted, inputs.counts = True, batch["attention_mask"].bool().flatten()
            walk.call(number, layer, walk.hidden(number, index), index)
