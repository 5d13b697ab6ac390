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
from ..fingerprint import hash_of_samples, model_fingerprint, storage_of
from ..layerwise.activations import ActivationStore
from ..layerwise.layers import StreamedModel
from ..layerwise.memory import activation_budget
from ..layerwise.walk import LayerWalk
from ..utils.logging import get_logger, progress
from .adding import add_parts
from .checks import (
    check_gram_memory,
    check_vocabulary,
    not_finite_error,
    warn_about_coverage,
    warn_about_products,
)
from .cost import Cost, measured_cost
from .finished import block_statistics, finished_statistics
from .layer_state import LayerProgress, LayerState
from .loss import summed_token_loss
from .processes import add_progress, check_same_run, start_processes
from .runner import begin_micro_batch, description_of_run, what_is_not_finite
from .state import Interruption, Progress, interruption
from .statistics import AtomicStatistics, BlockStatistics
from .tap import new_accumulators, switched_experts, tapped


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..layerwise.source import SourceCheckpoint
    from ..text.samples import CalibrationData


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
        model (`PreTrainedModel`): without storage, from [`~optimum_heapr.checkpoints.skeleton.load_skeleton`]; it stays so.
        source (`SourceCheckpoint`): its weights.
        data (`CalibrationData`): tokenized samples.
        folder (`Path`): an empty folder, or that of the run to go on from. It takes the activations past the budget and
            the statistics of the layers that are done. The result refers to the matrices there, so if it has any, the folder
            is to outlast it.
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
        `AtomicStatistics`: matrices are mapped from the files in `folder`. Of several processes the first has all of it, the
        others have it without matrices, in memory.

    Raises:
        HeaprError: as for `calibrate`, or if the layers of the model need more than hidden states of one another.
    """
    accelerator = start_processes()
    streamed = StreamedModel(model, source, accelerator.device)
    blocks = source.blocks
    if gram:
        largest = max(range(len(streamed.layers)), key=lambda index: sum(map(_matrix_size, streamed.blocks_of(index))))
        check_gram_memory(streamed.blocks_of(largest), place=accelerator.device)
        if accelerator.num_processes > 1 and accelerator.is_main_process:  # see `add_parts`
            check_gram_memory(streamed.blocks_of(largest), accelerator.num_processes, torch.device("cpu"))
    check_vocabulary(data, model.get_input_embeddings().weight.shape[0])
    warn_about_products(model.dtype, accelerator.device)
    batches = list(data.micro_batches(batch_size))
    own = range(accelerator.process_index, len(batches), accelerator.num_processes)
    first_experts = [source.expert(block, 0) for block in blocks]
    identity = {"model": model_fingerprint(model, first_experts), "storage": storage_of(model, blocks)}
    run = description_of_run(
        identity["model"], blocks, data, batch_size, gram, skip_nonfinite, accelerator.num_processes
    )
    run["kept"] = kept
    alone = accelerator.num_processes == 1
    if not alone:
        run["sums"] = "apart"  # from the parts: earlier versions put them in their place
    state = LayerState(folder, resumable)
    store = ActivationStore(folder, 0 if resumable else activation_budget(activation_memory))

    with (
        measured_cost() as cost,
        switched_experts(model, blocks),
        interruption(enabled=True) as interrupted,
    ):
        schedule = _Schedule(streamed, {index: batches[index] for index in own}, store, state, interrupted)
        schedule.gram, schedule.skip_nonfinite, schedule.sources = gram, skip_nonfinite, data.num_sources
        schedule.keep = (
            (lambda path, block: state.write_block(path, finish(path, block))) if alone else state.write_part
        )
        done = state.begin(run)
        if not alone:
            outside = hash_of_samples(streamed.all_samples(experts=False))  # of experts only the first is in `run`
            check_same_run(accelerator, {**run, "weights": outside, "memory": "streaming"})
        done = schedule.run(done)
        identity["model"]["weights"] = hash_of_samples(streamed.all_samples())
        check_same_run(accelerator, {"model": identity["model"]})
        statistics = {} if alone else add_parts(accelerator, state, done, finish, interrupted)
    loss, targets, skipped = schedule.totals(done, cost)
    if not alone:
        loss, targets, skipped = add_progress(accelerator, Progress(0, loss, targets, skipped))
    logger.info(
        "Layer inputs took at most %s bytes of memory and %s of disk",
        f"{store.most_in_memory:,}",
        f"{store.most_on_disk:,}",
    )
    statistics = {block.path: statistics.get(block.path) or state.read_block(block.path) for block in blocks}
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
        self.walk = LayerWalk(streamed, batches, store)
        self.gram, self.skip_nonfinite, self.sources = False, False, 1
        self.keep: Callable[[str, BlockStatistics], None]
        self.done = LayerProgress()

    def run(self, done: LayerProgress) -> LayerProgress:
        """All phases from where an earlier run stopped."""
        self.done = done
        with self.streamed.rest():
            self.walk.capture(self._counted(), keep_inputs=done.forward == 0)
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

    @torch.no_grad()
    def _forward(self) -> None:
        layers = range(self.done.forward, len(self.streamed.layers))
        total = len(self.streamed.layers)
        for number in progress(layers, desc="Forward", unit="layer", initial=layers.start, total=total):
            with self.streamed.layer(number, then=number + 1 if number + 1 < total else None) as layer:
                for index in self._counted():
                    self.walk.forward(number, layer, index)
            self.done.forward = number + 1
            self.state.save(self.done)
            if number < self.streamed.first:  # no backward will ask for it
                self.walk.drop("hidden", number)

    def _head(self) -> None:
        """The loss, and its gradient with respect to the output of the last layer."""
        if self.done.head:
            return
        last = len(self.streamed.layers)
        with self.streamed.rest():
            for index in progress(list(self._counted()), desc="Loss", unit="batch"):
                self.interrupted.act()
                ids, mask = self.walk.inputs(index)
                hidden = self.walk.hidden(last, index).requires_grad_(True)
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
        self.walk.drop("hidden", last)

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
            with self.streamed.layer(number, then=number - 1 if number > self.streamed.first else None) as layer:
                bad, statistics = self._measure(number, layer)
            if bad:
                return bad
            for path, block in statistics.items():
                self.keep(path, block)
                self.done.routed[path] = int(block.token_count.sum())
            self.done.backward = total - number
            self.state.save(self.done)
            if not self.skip_nonfinite:  # or else the backward may have to begin again
                self.walk.drop("hidden", number)
                self.walk.drop("gradient", number + 1)
        return []

    def _measure(self, number: int, layer: torch.nn.Module) -> tuple[list[int], dict[str, BlockStatistics]]:
        """Takes all micro-batches back through one layer."""
        blocks, bad = self.streamed.blocks_of(number), []
        accumulators = new_accumulators(blocks, self.gram, self.sources)
        with tapped(blocks, accumulators):
            for index in self._counted():
                begin_micro_batch(blocks, accumulators, self.batches[index])
                hidden = self.walk.hidden(number, index)
                hidden.requires_grad_(number > self.streamed.first)
                output = self.walk.call(number, layer, hidden, index)
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
