# Licensed under the Apache License, Version 2.0
"""What a calibration refuses before it begins or on its way, and what it warns of at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..layerwise import memory
from ..modeling.half_precision import lacks_products
from ..utils.errors import HeaprError
from ..utils.logging import get_logger, is_main_process


if TYPE_CHECKING:
    from ..experts import ExpertBlock
    from ..text.samples import CalibrationData
    from .statistics import AtomicStatistics


logger = get_logger(__name__)


def not_finite_error(problem: str, index: int, samples: list[int]) -> HeaprError:
    """What is said about a micro-batch whose loss or gradients are not finite."""
    return HeaprError(
        f"{problem}: not finite in micro-batch {index} (samples {samples}); look at these samples, load the model in "
        "bfloat16 or float32, or leave them out with skip_nonfinite=True"
    )


def check_gram_memory(
    blocks: list[ExpertBlock],
    copies: int = 1,
    place: torch.device | None = None,
    columns: Sequence[int] | None = None,
) -> None:
    """States what the second-order statistics take, and refuses what does not fit next to the model.

    Args:
        blocks (`list[ExpertBlock]`): the expert blocks that are measured at once.
        copies (`int`): how often each matrix is held.
        place (`torch.device`, *optional*): where they will be; defaults to where the blocks are.
        columns (`list[int]`, *optional*): of the matrices of each block, which have as many rows as the block is wide; defaults to
            the same number.

    Raises:
        HeaprError: naming the bytes needed and available, and on which device.
    """
    needed: dict[torch.device, int] = {}
    for block, number in zip(blocks, columns or [block.width for block in blocks]):
        device = place or block.device
        needed[device] = needed.get(device, 0) + copies * 2 * 4 * block.num_experts * block.width * number
    for device, size in needed.items():
        available = memory.available_bytes(device)
        logger.info(
            "Second-order statistics take %s bytes on %s, of %s available", f"{size:,}", device, f"{available:,}"
        )
        if size > available:
            raise HeaprError(
                f"statistics='gram': needs {size:,} bytes on {device} for two float32 matrices an expert, and {available:,} "
                "are available; spread the model over more memory, or use a criterion and compensate=False that "
                "statistics='vector' serves"
            )


def warn_about_products(dtype: torch.dtype, device: torch.device) -> None:
    """Says, on rank 0 alone, where a model would compute in a type that the device has no fast products of.

    Args:
        dtype (`torch.dtype`): of the model.
        device (`torch.device`): where it computes.
    """
    if is_main_process() and lacks_products(torch.empty(0, dtype=dtype, device=device)):
        name = str(dtype).removeprefix("torch.")
        logger.warning(
            f"This CPU has no instructions for products in {name}, and what PyTorch does in their place takes several times as long "
            "as float32 does. Load the model with dtype='float32' where there is memory for twice the bytes."
        )


def check_vocabulary(data: CalibrationData, vocabulary: int) -> None:
    """Refuses token ids that the model has no embedding for: on a GPU they would end the process."""
    for index, sample in enumerate(data.samples):
        if not (0 <= int(sample.min()) and int(sample.max()) < vocabulary):
            raise HeaprError(
                f"dataset={data.source!r}: sample {index} has token ids from {int(sample.min())} to {int(sample.max())}, "
                f"the model knows 0 to {vocabulary - 1}; use ids made by the tokenizer of this model"
            )


def warn_about_coverage(statistics: AtomicStatistics) -> None:
    """Names experts without any token, and counts those whose tokens are fewer than their atomic experts."""
    unreached = statistics.unreached
    scarce = [
        (count, block.width)
        for block in statistics.blocks.values()
        for count in block.token_count.tolist()
        if 0 < count < block.width
    ]
    if scarce:
        factor = max(width / count for count, width in scarce)
        logger.warning(
            "%d experts were reached by fewer tokens than they are wide, the least by %d, so the means of their atomic "
            "experts are rough. Raise num_samples (now %d; about %d would do for these), or add data of another kind.",
            len(scarce),
            min(count for count, _ in scarce),
            statistics.fingerprint["data"]["num_samples"],
            math.ceil(statistics.fingerprint["data"]["num_samples"] * factor),
        )
    if unreached:
        where = "; ".join(f"{path}: {experts}" for path, experts in unreached.items())
        logger.warning(
            "%d experts were reached by no calibration token, so their statistics are unknown and they are pruned first "
            "(%s). Raise num_samples, add data of another kind, or set protect_unreached=True or min_width.",
            sum(map(len, unreached.values())),
            where,
        )
