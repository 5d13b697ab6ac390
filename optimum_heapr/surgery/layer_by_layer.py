# Licensed under the Apache License, Version 2.0
"""All blocks of a model, one layer after another: what they are called with goes in, what they become comes out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save

from ..calibration.tap import switched_experts
from ..layerwise.activations import ActivationStore
from ..layerwise.decoder import replaced_forwards
from ..layerwise.memory import activation_budget
from ..layerwise.walk import LayerWalk
from ..utils.logging import get_logger, progress
from .block_compensation import fit_block
from .block_inputs import BlockInputs, watched_blocks
from .fit_files import FitFiles, description_of_fits, packed, unpacked
from .fitted import FittedBlock, in_place_of
from .portion import Portion
from .reconstruction import block_output, reconstruct_block
from .rerouting import Rerouting


if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..experts import ExpertBlock
    from ..layerwise.decoder import Decoder
    from ..planning.plan import PruningPlan
    from ..text.samples import CalibrationData


logger = get_logger(__name__)

_PLAN = "plan"  # names the routing of the one pruned model that is made


@torch.no_grad()
def compensate_together(
    decoder: Decoder,
    data: CalibrationData,
    plan: PruningPlan,
    folder: Path,
    keep: Callable[[ExpertBlock, FittedBlock], None],
    activation_memory: int | None = None,
    fits_path: Path | None = None,
    accelerator: Accelerator | None = None,
) -> None:
    """Fits all blocks of an unpruned model, from the first layer to the last, and trains them where that is asked for.

    It fills in `plan.compensation` and `plan.reconstruction`. Training takes a second stream of hidden states through the
    layers, that of the pruned model.

    Processes that are connected each take their portion of the text through the layers; what is summed over tokens is added up over
    all of them, and all go on with the blocks that the first has. Up to the rounding of sums they are those of one process.

    Args:
        decoder (`Decoder`): the layers; only one needs its weights at a time.
        data (`CalibrationData`): tokenized samples, `plan.config.batch_size` of which make a micro-batch.
        plan (`PruningPlan`): what stays.
        folder (`Path`): exists; takes the inputs of a layer past the budget.
        keep (`Callable`): is given each block and what becomes of it, and may change it: no other layer sees that.
        activation_memory (`int`, *optional*): bytes of layer inputs that are kept in the memory of the host; by default a
            quarter of what is free.
        fits_path (`Path`, *optional*): a folder that each block which is done is kept in, and taken from by a run that goes
            on; what it is called with is then still computed. Who made it removes it. Of several processes the first reads and writes.
        accelerator (`Accelerator`, *optional*): connects the processes that share the work, each of which is to be here; without
            one this process does all of it.

    Raises:
        HeaprError: if a layer needs more than the hidden states of the one before, what is in `fits_path` is of another run, or
            another process ended or is about something else.
    """
    plan.forget_fits()
    own = data.fingerprint
    if plan.data and plan.data["sha256"] != own["sha256"]:
        logger.warning(
            "The model is compensated on other text than it was measured on: %s tokens of %s in place of %s of %s",
            *(part for text in (own, plan.data) for part in (text["num_tokens"], text["source"])),
        )
    dtype = decoder.blocks[0].module.down_proj.dtype
    portion = Portion(data, plan.config.batch_size, accelerator)
    portion.check_same(description_of_fits(plan, data, dtype))
    fits = FitFiles(Path(fits_path), plan, data, dtype) if fits_path is not None and portion.is_first else None
    walk = walk_through(decoder, portion, folder, activation_memory)
    rerouting = Rerouting.of(decoder.model, decoder.blocks, plan)
    keeps = ("activations", "inputs") if plan.config.reconstruction_steps else ("activations",)
    last = max(number for number in range(len(decoder.layers)) if decoder.blocks_of(number))
    pruned: LayerWalk | None = None
    for number in progress(range(last + 1), desc="Compensating", unit="layer"):
        blocks = decoder.blocks_of(number)
        if plan.config.reconstruction_steps and number == decoder.first:
            pruned = walk.branch("pruned", number)
        with decoder.layer(number, then=number + 1 if number < last else None) as layer:
            called = calls_of(walk, number, layer, {_PLAN: rerouting}, portion, keeps)
            if portion.of_first(fits is not None and all(map(fits.has, blocks))):
                fitted = {block.path: fits.read(block, decoder.model) for block in blocks if fits is not None}
            else:
                in_pruned = {}
                if pruned and blocks:
                    in_pruned = pruned_calls_of(pruned, number, layer, blocks, rerouting, portion)
                fitted = {
                    block.path: _fitted(
                        decoder.model, block, called.pop(block.path), in_pruned.pop(block.path, None), plan, portion
                    )
                    for block in blocks
                }
                for block in blocks if fits is not None else ():
                    fits.write(block, fitted[block.path])
            fitted = {block.path: _of_first(portion, plan, block, fitted.get(block.path)) for block in blocks}
            if pruned:
                with in_place_of(decoder.model, blocks, plan.kept, fitted) as cut, routed_anew(rerouting, cut):
                    for index in walk.batches if number < last else ():
                        pruned.forward(number, layer, index)
                pruned.drop(pruned.stream, number)
            for block in blocks:
                keep(block, fitted[block.path])
    walk.drop(walk.stream, last + 1)


def walk_through(decoder: Decoder, portion: Portion, folder: Path, activation_memory: int | None) -> LayerWalk:
    """A walk of this portion of the text that is about to begin; other arguments as of [`compensate_together`]."""
    walk = LayerWalk(decoder, portion.batches, ActivationStore(folder, activation_budget(activation_memory)))
    with decoder.rest():
        walk.capture(portion.batches)
    return walk


def calls_of(
    walk: LayerWalk,
    number: int,
    layer: torch.nn.Module,
    reroutings: Mapping[Hashable, Rerouting | None],
    portion: Portion,
    keeps: Collection[str] = ("activations",),
) -> dict[str, BlockInputs]:
    """Takes all micro-batches of the unpruned model through a layer, and collects what its blocks are called with, by path.

    Args:
        walk (`LayerWalk`): has the inputs of the layer, which go, and gets those of the next.
        number (`int`): of the layer.
        layer (`torch.nn.Module`): with its weights in memory.
        reroutings (`Mapping[Hashable, Rerouting]`): pruned models whose routing of the same tokens is collected, too.
        portion (`Portion`): of the text, that is walked.
        keeps (`Collection[str]`): of shared experts, as for [`BlockInputs`].
    """
    model, blocks = walk.decoder.model, walk.decoder.blocks_of(number)
    # The experts of calibration take any width and type.
    with switched_experts(model, blocks), watched_blocks(model, blocks, keeps) as watched:
        for index, batch in walk.batches.items():
            for inputs in watched.values():
                inputs.counts = batch["counts"].flatten()
            walk.forward(number, layer, index)
        for name, rerouting in reroutings.items() if blocks else ():
            if rerouting is not None:
                _reroute(name, rerouting, walk, number, layer, watched)
    for inputs in watched.values():
        inputs.agree_on_shared(portion.added)
    walk.drop(walk.stream, number)
    return watched


def pruned_calls_of(
    pruned: LayerWalk,
    number: int,
    layer: torch.nn.Module,
    blocks: list[ExpertBlock],
    rerouting: Rerouting | None,
    portion: Portion,
) -> dict[str, BlockInputs]:
    """What the blocks of a layer are called with in the pruned model, by path: all below is pruned, they are not yet."""
    model = pruned.decoder.model
    with (
        switched_experts(model, blocks),
        watched_blocks(model, blocks, ("inputs",)) as watched,
        routed_anew(rerouting, blocks),
    ):
        for index, batch in pruned.batches.items():
            for inputs in watched.values():
                inputs.counts = batch["counts"].flatten()
            pruned.call(number, layer, pruned.hidden(number, index), index)
    for inputs in watched.values():
        inputs.agree_on_shared(portion.added)
    return watched


def routed_anew(rerouting: Rerouting | None, blocks: list[ExpertBlock]) -> AbstractContextManager[None]:
    """Until it ends tokens go where the routers of the pruned model send them."""
    return nullcontext() if rerouting is None else rerouting.active(blocks)


def _fitted(
    model: torch.nn.Module,
    block: ExpertBlock,
    inputs: BlockInputs,
    in_pruned: BlockInputs | None,
    plan: PruningPlan,
    portion: Portion,
) -> FittedBlock:
    """What a block becomes; the plan says what that did."""
    kept, config, rerouting = plan.kept[block.path], plan.config, inputs.rerouting(_PLAN)

    def fit(tokens: torch.Tensor | None) -> FittedBlock:
        if tokens is None:
            return fit_block(block, inputs, kept, config.ridge, rerouting, portion.added)
        chosen = None if rerouting is None else (rerouting[0][tokens], rerouting[1][tokens])
        return fit_block(block, inputs.only(tokens), kept, config.ridge, chosen, portion.added)

    if in_pruned is None:
        fitted = fit(None)
    else:
        shared = {path: mlp for path, mlp in in_pruned.shared.items() if path in inputs.shared}
        with switched_experts(model, [block]):
            target = block_output(block, inputs, shared)
        called = inputs.calls(rerouting), in_pruned.calls()
        fitted, errors = reconstruct_block(block, kept, fit, called, shared, target, config, portion)
        plan.reconstruction |= {block.path: errors} if errors else {}
    plan.compensation[block.path] = [(fitted.error_before, fitted.error_after)] * block.num_experts
    return fitted


def _of_first(portion: Portion, plan: PruningPlan, block: ExpertBlock, fitted: FittedBlock | None) -> FittedBlock:
    """What a block is for the first process, on each; the plan says of it what the first's does."""
    if portion.is_alone:
        return fitted
    found = None
    if portion.is_first:
        tensors, document = packed(plan, block, fitted)
        found = save({name: part.contiguous() for name, part in tensors.items()}), document
    tensors, document = portion.of_first(found)
    return fitted if portion.is_first else unpacked(plan, block, load(tensors), document)


def _reroute(
    name: Hashable,
    rerouting: Rerouting,
    walk: LayerWalk,
    number: int,
    layer: torch.nn.Module,
    watched: dict[str, BlockInputs],
) -> None:
    """Shows to `watched` how a pruned model routes the tokens of a layer. What its experts would give is left out."""
    blocks = walk.decoder.blocks_of(number)

    def nothing(index: int) -> Callable:
        return lambda hidden, *inputs, **named: torch.zeros_like(hidden)

    with rerouting.active(blocks), replaced_forwards([block.module for block in blocks], nothing):
        for index, batch in walk.batches.items():
            for inputs in watched.values():
                inputs.rerouted, inputs.counts = name, batch["counts"].flatten()
            walk.call(number, layer, walk.hidden(number, index), index)
