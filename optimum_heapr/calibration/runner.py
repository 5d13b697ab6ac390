# Licensed under the Apache License, Version 2.0
"""Runs the calibration text through a model, one forward and one activation-only backward a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch

from ..experts import find_expert_blocks
from ..utils.errors import HeaprError
from ..utils.logging import get_logger, progress
from .loss import summed_token_loss
from .statistics import AtomicStatistics, BlockStatistics, model_fingerprint, storage_of
from .tap import BlockAccumulator, calibration_tap


if TYPE_CHECKING:
    from ..experts import ExpertBlock
    from .data import CalibrationData


logger = get_logger(__name__)


def calibrate(
    model: torch.nn.Module, data: CalibrationData, batch_size: int = 1, gram: bool = False
) -> AtomicStatistics:
    """Measures the statistics of every atomic expert of `model` on `data`.

    The model comes back as it was: weights, gradients flags, mode, experts implementation. Under `accelerate launch`
    each process takes every N-th micro-batch and the sums are added over processes.

    Args:
        model (`PreTrainedModel`): any model whose experts are on the experts interface of transformers.
        data (`CalibrationData`): tokenized samples.
        batch_size (`int`): samples in a micro-batch.
        gram (`bool`): also measure the second-order statistics, two I x I matrices for each expert, in the same pass.

    Returns:
        `AtomicStatistics`: on the CPU.

    Raises:
        HeaprError: if the model has no prunable experts or no embedding for a token id, the second-order statistics do
            not fit into memory, or a loss or gradient is not finite.
    """
    from accelerate import Accelerator

    blocks = find_expert_blocks(model)
    accelerator = Accelerator()
    if getattr(model, "hf_device_map", None) is None:
        model.to(accelerator.device)
    device = model.get_input_embeddings().weight.device
    device = accelerator.device if device.type == "meta" else device
    if gram:
        check_gram_memory(blocks)
    _check_vocabulary(data, model.get_input_embeddings().weight.shape[0])
    batches = list(data.micro_batches(batch_size))
    own = range(accelerator.process_index, len(batches), accelerator.num_processes)

    total_loss, total_targets = torch.zeros((), dtype=torch.float64), 0
    with frozen_in_evaluation_mode(model), calibration_tap(model, blocks, gram) as accumulators:
        for index in progress(own, desc="Calibrating", unit="batch"):
            batch = batches[index]
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            for block in blocks:
                block_mask = None if batch["attention_mask"].all() else mask.reshape(-1).bool()
                accumulators[block.path].token_mask = (
                    block_mask if block_mask is None else block_mask.to(block.module.down_proj.device)
                )
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss, targets = summed_token_loss(logits, ids, mask)
            del logits
            if not math.isfinite(loss.item()):
                raise HeaprError(
                    f"loss={loss.item()}: not finite in micro-batch {index} (samples {batch['sample_index'].tolist()}); "
                    "look at these samples, or load the model in bfloat16 or float32"
                )
            loss.backward()
            total_loss += loss.item()
            total_targets += targets

    statistics = {block.path: _collect(block, accumulators[block.path]) for block in blocks}
    if accelerator.num_processes > 1:
        statistics = {path: _add_over_processes(accelerator, block) for path, block in statistics.items()}
        totals = torch.tensor([total_loss, total_targets], dtype=torch.float64, device=accelerator.device)
        summed = accelerator.reduce(totals, "sum")
        total_loss, total_targets = summed[0], int(summed[1])
    for path, block in statistics.items():
        if not torch.isfinite(block.gradient_sq_sum).all():
            raise HeaprError(f"gradients of {path}: not finite; load the model in bfloat16 or float32")
    result = AtomicStatistics(
        statistics,
        {
            "model": model_fingerprint(model, blocks),
            "storage": storage_of(model, blocks),
            "data": data.fingerprint,
            "seed": data.seed,
            "seq_length": data.seq_length,
            "loss": float(total_loss) / max(total_targets, 1),
        },
    )
    _warn_about_unreached(result)
    return result


@contextmanager
def frozen_in_evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """No weight gradients, no dropout; both as before when the block ends."""
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


def check_gram_memory(blocks: list[ExpertBlock]) -> None:
    """States what the second-order statistics take, and refuses what does not fit next to the model.

    Raises:
        HeaprError: naming the bytes needed and available, and on which device.
    """
    needed: dict[torch.device, int] = {}
    for block in blocks:
        device = block.module.down_proj.device
        needed[device] = needed.get(device, 0) + 2 * 4 * block.num_experts * block.width**2
    for device, size in needed.items():
        available = _available_bytes(device)
        logger.info(
            "Second-order statistics take %s bytes on %s, of %s available", f"{size:,}", device, f"{available:,}"
        )
        if size > available:
            raise HeaprError(
                f"statistics='gram': needs {size:,} bytes on {device} for two float32 matrices an expert, and {available:,} "
                "are available; spread the model over more memory, or use a criterion and compensate=False that "
                "statistics='vector' serves"
            )


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def _check_vocabulary(data: CalibrationData, vocabulary: int) -> None:
    """Refuses token ids that the model has no embedding for: on a GPU they would end the process."""
    for index, sample in enumerate(data.samples):
        if not (0 <= int(sample.min()) and int(sample.max()) < vocabulary):
            raise HeaprError(
                f"dataset={data.source!r}: sample {index} has token ids from {int(sample.min())} to {int(sample.max())}, "
                f"the model knows 0 to {vocabulary - 1}; use ids made by the tokenizer of this model"
            )


def _collect(block: ExpertBlock, sums: BlockAccumulator) -> BlockStatistics:
    measured = {part.name: getattr(sums, part.name) for part in fields(BlockStatistics) if hasattr(sums, part.name)}
    return BlockStatistics(
        weight_norm=block.atomic_norms(),
        **{name: None if tensor is None else tensor.cpu() for name, tensor in measured.items()},
    )


def _add_over_processes(accelerator, block: BlockStatistics) -> BlockStatistics:
    def added(tensor: torch.Tensor) -> torch.Tensor:
        return accelerator.reduce(tensor.to(accelerator.device), "sum").cpu()

    measured = {part.name: getattr(block, part.name) for part in fields(BlockStatistics) if part.name != "weight_norm"}
    return replace(block, **{name: added(tensor) for name, tensor in measured.items() if tensor is not None})


def _warn_about_unreached(statistics: AtomicStatistics) -> None:
    unreached = statistics.unreached
    if unreached:
        where = "; ".join(f"{path}: {experts}" for path, experts in unreached.items())
        logger.warning(
            "%d experts were reached by no calibration token, so their statistics are unknown and they are pruned first "
            "(%s). Raise num_samples, add data of another kind, or set protect_unreached=True or min_width.",
            sum(map(len, unreached.values())),
            where,
        )
