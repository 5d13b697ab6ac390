# Licensed under the Apache License, Version 2.0
"""Calibration layer by layer, for a model that is never in memory: each layer's weights are read twice in all.

Forward, first layer to last: read the layer, run all micro-batches through it, keep what goes into it. Then the norm and
the head, for the loss and its gradient with respect to the last hidden states. Backward, last layer to first: read the
layer again, recompute it from its stored input, and take the stored gradient back through it with the calibration tap in
place. The sums are those of the plain run; of the second-order statistics one layer's matrices are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..experts import ExpertBlock
from ..utils.logging import get_logger, progress
from .activations import ActivationStore
from .decoder import LayerCall, Slot, filled
from .layer_state import LayerProgress, LayerState
from .layers import StreamedModel
from .loss import summed_token_loss
from .memory import Cost, activation_budget, measured_cost
from .processes import add_block, add_progress, start_processes
from .runner import (
    block_statistics,
    check_gram_memory,
    check_vocabulary,
    finished_statistics,
    mask_padding,
    not_finite_error,
    warn_about_coverage,
    what_is_not_finite,
)
from .state import Interruption, Progress, interruption
from .statistics import AtomicStatistics, BlockStatistics, hash_of_samples, model_fingerprint, storage_of
from .tap import new_accumulators, switched_experts, tapped


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..checkpoint import SourceCheckpoint
    from .data import CalibrationData


logger = get_logger(__name__)


def calibrate_streaming(
    model: PreTrainedModel,
    source: SourceCheckpoint,
    data: CalibrationData,
    folder: Path,
    batch_size: int = 1,
    gram: bool = False,
    skip_nonfinite: bool = False,
    resumable: bool = False,
    activation_memory: int | None = None,
    finish: Callable[[str, BlockStatistics], BlockStatistics] = lambda path, block: block,
    kept: dict[str, Any] | None = None,
) -> AtomicStatistics:
    """Measures the statistics of every atomic expert of a model that is read from its checkpoint layer by layer.

    Args:
        model (`PreTrainedModel`): without storage, from [`~optimum_heapr.surgery.skeleton.load_skeleton`]; it stays so.
        source (`SourceCheckpoint`): its weights.
        data (`CalibrationData`): tokenized samples.
        folder (`Path`): an empty folder, or that of the run to go on from. It takes the activations past the budget and
            the statistics of the layers that are done, which the result refers to: it may be deleted while the result is
            in use, where files that are mapped into memory can be.
        batch_size (`int`): samples in a micro-batch.
        gram (`bool`): also measure the second-order statistics, two I x I matrices for each expert.
        skip_nonfinite (`bool`): leave out micro-batches whose loss or gradients are not finite. If a gradient turns out so
            after layers above were measured, the backward begins again without that micro-batch.
        resumable (`bool`): keep all that another run needs to go on from the last layer that was done; all activations
            are then written to the folder.
        activation_memory (`int`, *optional*): bytes of layer inputs that are kept in the memory of the host; by default a
            quarter of what is free.
        finish (`Callable`): makes what is kept of a block from its sums over all data.
        kept (`dict`, *optional*): what `finish` depends on, plain JSON types: a run is not resumed with another.

    Returns:
        `AtomicStatistics`: tensors are mapped from the files in `folder`.

    Raises:
        HeaprError: as for `calibrate`, or if the layers of the model need more than hidden states of one another.
    """
    accelerator = start_processes()
    streamed = StreamedModel(model, source, accelerator.device)
    blocks = source.blocks
    if gram:
        largest = max(range(len(streamed.layers)), key=lambda index: sum(map(_matrix_size, streamed.blocks_of(index))))
        check_gram_memory(streamed.blocks_of(largest), place=accelerator.device)
    check_vocabulary(data, model.get_input_embeddings().weight.shape[0])
    batches = list(data.micro_batches(batch_size))
    own = range(accelerator.process_index, len(batches), accelerator.num_processes)
    first_experts = [source.expert(block, 0) for block in blocks]
    identity = {"model": model_fingerprint(model, first_experts), "storage": storage_of(model, blocks)}
    run = {
        "model": {**identity["model"], "dtype": str(blocks[0].module.down_proj.dtype)},
        "data": data.fingerprint,
        "seed": data.seed,
        "seq_length": data.seq_length,
        "batch_size": batch_size,
        "statistics": "gram" if gram else "vector",
        "skip_nonfinite": skip_nonfinite,
        "processes": accelerator.num_processes,
        "kept": kept,
    }
    state = LayerState(folder, resumable)
    store = ActivationStore(folder, 0 if resumable else activation_budget(activation_memory))
    alone = accelerator.num_processes == 1

    with (
        measured_cost() as cost,
        switched_experts(model, blocks),
        interruption(enabled=True) as interrupted,
    ):
        schedule = _Schedule(streamed, {index: batches[index] for index in own}, store, state, interrupted)
        schedule.gram, schedule.skip_nonfinite = gram, skip_nonfinite
        schedule.finish = finish if alone else (lambda path, block: block)
        done = schedule.run(state.begin(run))
        if not alone:
            for block in progress(blocks, desc="Adding", unit="layer"):
                state.write_block(block.path, finish(block.path, add_block(accelerator, state.read_block(block.path))))
    loss, targets, skipped = schedule.totals(done, cost)
    if not alone:
        loss, targets, skipped = add_progress(accelerator, Progress(0, loss, targets, skipped))
    logger.info(
        "Layer inputs took at most %s bytes of memory and %s of disk",
        f"{store.most_in_memory:,}",
        f"{store.most_on_disk:,}",
    )
    identity["model"]["weights"] = hash_of_samples(streamed.all_samples())
    statistics = {block.path: state.read_block(block.path) for block in blocks}
    result = finished_statistics(identity, data, statistics, loss, targets, skipped)
    result.cost = cost
    if accelerator.is_main_process:
        warn_about_coverage(result)
    return result


def _matrix_size(block: ExpertBlock) -> int:
    return block.num_experts * block.width**2


class _Schedule:
    """The three phases over the micro-batches of one process."""

    def __init__(
        self,
        streamed: StreamedModel,
        batches: dict[int, dict[str, torch.Tensor]],
        store: ActivationStore,
        state: LayerState,
        interrupted: Interruption,
    ):
        self.streamed, self.batches, self.store, self.state = streamed, batches, store, state
        self.interrupted = interrupted
        self.gram = self.skip_nonfinite = False
        self.finish: Callable[[str, BlockStatistics], BlockStatistics]
        self.done = LayerProgress()
        self._calls: dict[int, list[LayerCall]] = {}
        self._arguments: dict[int, list[torch.Tensor | str]] = {}

    def run(self, done: LayerProgress) -> LayerProgress:
        """All phases from where an earlier run stopped."""
        self.done = done
        self._capture()
        self._forward()
        self._head()
        while bad := self._backward():
            # What the layers above have of these micro-batches cannot be taken out again.
            done.skipped, done.backward = sorted({*done.skipped, *bad}), 0
            self.state.save(done)
        return done

    def totals(self, done: LayerProgress, cost: Cost) -> tuple[float, int, list[int]]:
        """Summed loss, tokens predicted, and samples that were left out; puts the tokens that were measured into `cost`."""
        skipped = [sample for index in done.skipped for sample in self.batches[index]["sample_index"].tolist()]
        loss = sum(done.losses[str(index)][0] for index in self._counted())
        targets = sum(done.losses[str(index)][1] for index in self._counted())
        cost.tokens = sum(int(self.batches[index]["attention_mask"].sum()) for index in self._counted())
        return loss, targets, skipped

    def _counted(self) -> Iterator[int]:
        """Micro-batches that were not left out; a signal takes effect between them."""
        for index in self.batches:
            self.interrupted.act()
            if index not in self.done.skipped:
                yield index

    def _capture(self) -> None:
        """Finds what the layers are called with, and stores the input of the first."""
        same: list[torch.Tensor] = []
        with self.streamed.rest():
            for index in self._counted():
                hidden, self._calls[index], tensors = self.streamed.calls(*self._inputs(index))
                if self.done.forward == 0:
                    self.store.put(f"hidden.0.{index}", hidden)
                # Positions, and masks where nothing is padded, are those of the first micro-batch: one copy will do.
                same = same or tensors
                self._arguments[index] = []
                for slot, tensor in enumerate(tensors):
                    if slot < len(same) and tensor.shape == same[slot].shape and torch.equal(tensor, same[slot]):
                        self._arguments[index].append(same[slot])
                    else:
                        self._arguments[index].append(f"argument.{slot}.{index}")
                        self.store.put(f"argument.{slot}.{index}", tensor)

    def _inputs(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch, device = self.batches[index], self.streamed.device
        return batch["input_ids"].to(device), batch["attention_mask"].to(device)

    def _call(self, number: int, layer: torch.nn.Module, hidden: torch.Tensor, index: int) -> torch.Tensor:
        """One layer on one micro-batch."""

        def tensor_of(slot: Slot) -> torch.Tensor:
            kept = self._arguments[index][slot.index]
            return kept if isinstance(kept, torch.Tensor) else self.store.get(kept, self.streamed.device)

        call = self._calls[index][number]
        return self.streamed.checked(layer(hidden, *filled(call.args, tensor_of), **filled(call.kwargs, tensor_of)))

    @torch.no_grad()
    def _forward(self) -> None:
        layers = range(self.done.forward, len(self.streamed.layers))
        total = len(self.streamed.layers)
        for number in progress(layers, desc="Forward", unit="layer", initial=layers.start, total=total):
            with self.streamed.layer(number) as layer:
                for index in self._counted():
                    hidden = self.store.get(f"hidden.{number}.{index}", self.streamed.device)
                    self.store.put(f"hidden.{number + 1}.{index}", self._call(number, layer, hidden, index))
            self.done.forward = number + 1
            self.state.save(self.done)
            if number < self.streamed.first:  # no backward will ask for it
                self._drop("hidden", number)

    def _head(self) -> None:
        """The loss, and its gradient with respect to the output of the last layer."""
        if self.done.head:
            return
        last = len(self.streamed.layers)
        with self.streamed.rest():
            for index in progress(list(self._counted()), desc="Loss", unit="batch"):
                self.interrupted.act()
                ids, mask = self._inputs(index)
                hidden = self.store.get(f"hidden.{last}.{index}", self.streamed.device).requires_grad_(True)
                loss, targets = summed_token_loss(self.streamed.logits(ids, mask, hidden), ids, mask)
                self.done.losses[str(index)] = [loss.item(), targets]
                if not math.isfinite(loss.item()):
                    self._leave_out(f"loss={loss.item()}", index)
                    self.done.skipped.append(index)
                    continue
                loss.backward()
                self.streamed.check_others_unused()
                self.store.put(f"gradient.{last}.{index}", hidden.grad)
        self.done.head = True
        self.state.save(self.done)
        self._drop("hidden", last)

    def _leave_out(self, problem: str, index: int) -> None:
        samples = self.batches[index]["sample_index"].tolist()
        if not self.skip_nonfinite:
            raise not_finite_error(problem, index, samples)
        logger.warning("%s: not finite in micro-batch %d, left out (samples %s)", problem, index, samples)

    def _backward(self) -> list[int]:
        """The statistics of all layers that are not done, or the micro-batches that turned out not to be finite."""
        total = len(self.streamed.layers)
        numbers = range(total - 1 - self.done.backward, self.streamed.first - 1, -1)
        bar = {
            "desc": "Backward",
            "unit": "layer",
            "initial": self.done.backward,
            "total": total - self.streamed.first,
        }
        for number in progress(numbers, **bar):
            with self.streamed.layer(number) as layer:
                bad, statistics = self._measure(number, layer)
            if bad:
                return bad
            for path, block in statistics.items():
                self.state.write_block(path, self.finish(path, block))
            self.done.backward = total - number
            self.state.save(self.done)
            if not self.skip_nonfinite:  # or else the backward may have to begin again
                self._drop("hidden", number)
                self._drop("gradient", number + 1)
        return []

    def _measure(self, number: int, layer: torch.nn.Module) -> tuple[list[int], dict[str, BlockStatistics]]:
        """Takes all micro-batches back through one layer."""
        blocks, bad = self.streamed.blocks_of(number), []
        accumulators = new_accumulators(blocks, self.gram)
        with tapped(blocks, accumulators):
            for index in self._counted():
                mask_padding(blocks, accumulators, self.batches[index])
                hidden = self.store.get(f"hidden.{number}.{index}", self.streamed.device)
                hidden.requires_grad_(number > self.streamed.first)
                output = self._call(number, layer, hidden, index)
                output.backward(self.store.get(f"gradient.{number + 1}.{index}", self.streamed.device))
                problem = what_is_not_finite(accumulators)
                if problem:
                    self._leave_out(problem, index)
                    bad.append(index)
                    for accumulator in accumulators.values():
                        accumulator.clear()
                elif number > self.streamed.first:
                    self.store.put(f"gradient.{number}.{index}", hidden.grad)
        return bad, {} if bad else {block.path: block_statistics(block, accumulators[block.path]) for block in blocks}

    def _drop(self, what: str, number: int) -> None:
        for index in self.batches:
            self.store.drop(f"{what}.{number}.{index}")
