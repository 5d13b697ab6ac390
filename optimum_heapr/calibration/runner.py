# Licensed under the Apache License, Version 2.0
"""Runs the calibration text through a model, one forward and one activation-only backward a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..experts import find_expert_blocks
from ..fingerprint import model_fingerprint, storage_of
from ..layerwise.memory import checkpointed_layers, has_offloaded_weights
from ..utils.logging import get_logger, progress, show_throughput
from ..utils.sharded import is_sharded
from .checks import (
    check_gram_memory,
    check_vocabulary,
    not_finite_error,
    warn_about_coverage,
    warn_about_products,
)
from .cost import Cost, measured_cost
from .finished import block_statistics, finished_statistics
from .loss import summed_token_loss
from .processes import (
    add_progress,
    check_placement,
    check_same_run,
    finished_blocks,
    start_processes,
)
from .sharing import Share, check_sharding, share_of
from .state import Progress, StateFile, interruption
from .tap import BlockAccumulator, calibration_tap, new_accumulators


if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..experts import ExpertBlock
    from ..text.samples import CalibrationData
    from .statistics import AtomicStatistics, BlockStatistics


logger = get_logger(__name__)


def calibrate(
    model: torch.nn.Module,
    data: CalibrationData,
    batch_size: int = 1,
    gram: bool = False,
    skip_nonfinite: bool = False,
    state: StateFile | None = None,
    checkpointing: bool = False,
    finish: Callable[[str, BlockStatistics], BlockStatistics] | None = None,
) -> AtomicStatistics:
    """Measures the statistics of every atomic expert of `model` on `data`.

    The model comes back as it was: weights, gradients flags, mode, experts implementation. Under `accelerate launch`
    each process takes every N-th micro-batch and the sums are added over processes, also where FSDP2 spreads the weights over
    them. Where tensor parallelism has split the experts by width, each takes its atomic experts through all micro-batches.

    Args:
        model (`PreTrainedModel`): any model whose experts are on the experts interface of transformers.
        data (`CalibrationData`): tokenized samples.
        batch_size (`int`): samples in a micro-batch.
        gram (`bool`): also measure the second-order statistics, two I x I matrices for each expert, in the same pass.
        skip_nonfinite (`bool`): leave out micro-batches whose loss or gradients are not finite, and list their samples in
            the fingerprint, instead of stopping.
        state (`StateFile`, *optional*): where the run is saved and goes on from. The caller removes it.
        checkpointing (`bool`): keep only the inputs of the layers for the backward; always so for offloaded weights.
        finish (`Callable`, *optional*): as for [`~optimum_heapr.calibration.processes.finished_blocks`].

    Returns:
        `AtomicStatistics`: on the CPU; of several processes the first alone has the second-order statistics.

    Raises:
        HeaprError: if the model has no prunable experts, is spread over processes in another way, or has no embedding for a
            token id, the second-order statistics do not fit into memory, a loss or gradient is not finite, or the state is
            of another run.
    """
    check_sharding(model)
    whole = find_expert_blocks(model)
    accelerator = start_processes(is_sharded(model))
    share = share_of(model, whole, accelerator)
    blocks, device = share.parts(whole), _placed(model, accelerator)
    if gram:
        check_gram_memory(blocks, copies=2 if skip_nonfinite else 1, columns=[block.width for block in whole])
        if share.splits and accelerator.is_main_process:  # which puts the parts of all together
            check_gram_memory(whole, place=torch.device("cpu"))
    check_vocabulary(data, model.get_input_embeddings().weight.shape[0])
    warn_about_products(model.dtype, accelerator.device)
    batches = list(data.micro_batches(batch_size))
    own = share.micro_batches(len(batches))
    identity = model_fingerprint(model, whole, gathered=True)
    run = description_of_run(identity, blocks, data, batch_size, gram, skip_nonfinite, accelerator.num_processes)
    run |= share.description

    with (
        measured_cost() as cost,
        frozen_in_evaluation_mode(model),
        checkpointed_layers(model, checkpointing or has_offloaded_weights(model)),
        calibration_tap(model, blocks, gram, data.num_sources, share.splits) as accumulators,
        interruption(enabled=state is not None) as interrupted,
    ):
        # What is to be left out must not have been added: a micro-batch then has sums of its own.
        totals = new_accumulators(blocks, gram, data.num_sources, share.splits) if skip_nonfinite else accumulators
        done = Progress() if state is None else state.begin(run, totals)
        check_same_run(accelerator, {**run, "memory": "all weights at once"})
        share.check_in_step(done)
        measuring = _Measuring(model, blocks, share, device, accumulators, totals, done, cost)
        bar = progress(own[done.batches :], desc="Calibrating", unit="batch", initial=done.batches, total=len(own))
        for index in bar:
            measuring.add(batches, index, skip_nonfinite)
            show_throughput(bar, cost.tokens)
            if state is not None:
                interrupted.signal = share.agreed(interrupted.signal)
            if state is not None and (state.is_due(done) or interrupted.signal is not None):
                state.save(done, totals)
            interrupted.act()
        if state is not None:
            state.save(done, totals)
        interrupted.act()

    sums = ((block.path, block_statistics(block, totals[block.path])) for block in whole)
    measured = ((path, share.counted(path, block)) for path, block in sums)
    statistics = finished_blocks(accelerator, measured, finish)
    total_loss, total_targets, skipped = add_progress(accelerator, share.progress(done))
    identity = {"model": model_fingerprint(model, whole, gathered=True), "storage": storage_of(model, whole)}
    result = finished_statistics(identity, data, statistics, total_loss, total_targets, skipped)
    result.cost = cost
    if accelerator.is_main_process:
        warn_about_coverage(result)
    return result


def _placed(model: torch.nn.Module, accelerator: Accelerator) -> torch.device:
    """Where token ids go; a model that is not spread already, over devices or processes, goes to the device of this process."""
    check_placement(model, accelerator.num_processes)
    if getattr(model, "hf_device_map", None) is None and not is_sharded(model):
        model.to(accelerator.device)
    device = model.get_input_embeddings().weight.device
    return accelerator.device if device.type == "meta" else device


def description_of_run(
    model: dict[str, Any],
    blocks: list[ExpertBlock],
    data: CalibrationData,
    batch_size: int,
    gram: bool,
    skip_nonfinite: bool,
    processes: int,
) -> dict[str, Any]:
    """What the sums of a run depend on, plain JSON types: an interrupted one goes on only with the same.

    Args:
        model (`dict`): the model's fingerprint.
        blocks, data, batch_size, gram, skip_nonfinite: as of [`calibrate`].
        processes (`int`): how many share the samples.
    """
    return {
        **({"by_source": True} if data.num_sources > 1 else {}),  # earlier versions added all sources up
        "model": {**model, "dtype": str(blocks[0].module.down_proj.dtype)},
        "data": data.fingerprint,
        "seed": data.seed,
        "seq_length": data.seq_length,
        "batch_size": batch_size,
        "statistics": "gram" if gram else "vector",
        "skip_nonfinite": skip_nonfinite,
        "processes": processes,
    }


_QUANTITIES = {"gradient_sq_sum": "gradients", "activation_sq_sum": "activations", "output_norm_sum": "outputs"}


@dataclass
class _Measuring:
    """One process on its way through its micro-batches.

    Attributes:
        model, blocks: what is measured.
        share (`Share`): what this process has of it.
        device (`torch.device`): where token ids go.
        accumulators (`dict`): by block, what the tap adds to.
        totals (`dict`): by block, the sums of all micro-batches; the same objects unless some may be left out.
        done (`Progress`): how far it came.
        cost (`Cost`): what it took.
    """

    model: torch.nn.Module
    blocks: list[ExpertBlock]
    share: Share
    device: torch.device
    accumulators: dict[str, BlockAccumulator]
    totals: dict[str, BlockAccumulator]
    done: Progress
    cost: Cost

    def add(self, batches: list[dict[str, torch.Tensor]], index: int | None, skip_nonfinite: bool) -> None:
        """Adds one micro-batch to the totals, or leaves it out where something is not finite.

        Args:
            batches (`list`): all micro-batches.
            index (`int`, *optional*): which it is; without one, the process only computes along with the others.
            skip_nonfinite (`bool`): as of [`calibrate`].

        Raises:
            HeaprError: if something is not finite and nothing may be left out.
        """
        batch = batches[index or 0]
        loss, targets, problem = self._measure(batch, counts=index is not None)
        samples = batch["sample_index"].tolist()
        problem = self.share.concerning(problem and (problem, index, samples), skip_nonfinite)
        if problem and not skip_nonfinite:
            raise not_finite_error(*problem)
        if problem:
            logger.warning("%s: not finite in micro-batch %d, left out (samples %s)", *problem)
            self.done.skipped += samples
        elif index is not None:
            self.done.loss += loss
            self.done.targets += targets
            self.cost.tokens += int(batch["attention_mask"].sum())
        if skip_nonfinite:
            for path, accumulator in self.accumulators.items():
                accumulator.clear() if problem else accumulator.move_to(self.totals[path])
        self.done.batches += 1

    def _measure(self, batch: dict[str, torch.Tensor], counts: bool = True) -> tuple[float, int, str | None]:
        """Adds one micro-batch to the accumulators, if it counts.

        Returns:
            `tuple[float, int, str | None]`: summed loss in nats, tokens predicted, and what is not finite, if anything; the
            accumulators then hold what must not be used.
        """
        ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        begin_micro_batch(self.blocks, self.accumulators, batch, counts)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss, targets = summed_token_loss(logits, ids, mask)
        del logits
        value = loss.item()
        loss.backward()  # in any case: other processes may wait for what it gathers
        if not counts:
            return value, targets, None
        return value, targets, what_is_not_finite(self.accumulators) if math.isfinite(value) else f"loss={value}"


def begin_micro_batch(
    blocks: list[ExpertBlock],
    accumulators: dict[str, BlockAccumulator],
    batch: dict[str, torch.Tensor],
    counts: bool = True,
) -> None:
    """Tells the accumulators whether the coming micro-batch counts, which of its tokens do, and of which source it is."""
    mask = batch["attention_mask"]
    for block in blocks:
        accumulators[block.path].counts = counts
        accumulators[block.path].token_mask = None if mask.all() else mask.reshape(-1).bool().to(block.device)
        accumulators[block.path].source = int(batch["source"])


def what_is_not_finite(accumulators: dict[str, BlockAccumulator]) -> str | None:
    """Which sum of which block is not finite, if any."""
    names = [(path, name) for path, accumulator in accumulators.items() for name in accumulator.sums()]
    flags = [accumulator.finite() for accumulator in accumulators.values()]
    # Of all blocks at once: each time that a number is read, an accelerator has to be waited for.
    finite = torch.cat([flag.to(flags[0].device) for flag in flags]).tolist()
    return next(
        (f"{_QUANTITIES.get(name, name)} of {path}" for (path, name), good in zip(names, finite) if not good), None
    )


@contextmanager
def frozen_in_evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """No weight gradients, no dropout; both as before when the block ends."""
    training = {module: module.training for module in model.modules()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        # By name: offloaded weights are other objects each time that they come and go.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
