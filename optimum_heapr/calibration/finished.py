# Licensed under the Apache License, Version 2.0
"""From the sums of a calibration to its statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..utils.errors import HeaprError
from .statistics import SUMMED_BY_SOURCE, AtomicStatistics, BlockStatistics


if TYPE_CHECKING:
    from ..experts import ExpertBlock
    from ..text.samples import CalibrationData
    from .accumulator import BlockAccumulator


def block_statistics(block: ExpertBlock, sums: BlockAccumulator) -> BlockStatistics:
    """What one process measured of a block, on the CPU."""
    sums.complete()
    measured = {name: tensor.cpu() for name, tensor in sums.sums().items()}
    if sums.sources > 1:
        by_source = {name: measured[name] for name in SUMMED_BY_SOURCE}
        measured |= {name: tensor.sum(1) for name, tensor in by_source.items()}
        measured |= {f"source_{name}": tensor for name, tensor in by_source.items()}
    return BlockStatistics(weight_norm=block.atomic_norms(), **measured)


def finished_statistics(
    identity: dict[str, Any],
    data: CalibrationData,
    statistics: dict[str, BlockStatistics],
    loss: float,
    targets: int,
    skipped: list[int],
) -> AtomicStatistics:
    """The statistics of all processes with what they were measured on."""
    if not targets:
        raise HeaprError("skip_nonfinite=True: every micro-batch was left out; load the model in bfloat16 or float32")
    for path, block in statistics.items():
        for name in ("activation_sq_sum", "gradient_sq_sum", "fisher_sum", "output_norm_sum", "weight_norm"):
            if not torch.isfinite(getattr(block, name)).all():
                raise HeaprError(f"{name} of {path}: not finite; load the model in bfloat16 or float32")
    fingerprint = {
        **identity,
        "data": data.fingerprint,
        "seed": data.seed,
        "seq_length": data.seq_length,
        "loss": loss / targets,
    }
    if skipped:
        fingerprint["skipped"] = skipped
        fingerprint["data"]["num_samples"] -= len(skipped)
        fingerprint["data"]["num_tokens"] -= sum(len(data.samples[index]) for index in skipped)
        for index in skipped:
            part = fingerprint["data"]["sources"][data.source_of(index)]
            part["num_samples"] -= 1
            part["num_tokens"] -= len(data.samples[index])
    return AtomicStatistics(statistics, fingerprint)
