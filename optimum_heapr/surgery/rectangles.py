# Licensed under the Apache License, Version 2.0
"""Which number of experts and which width lose least at one size, measured in one pass through the calibration text.

Every rectangle is fitted as it would be if it were chosen, the down projections of each block together and under the routing
of the experts that stay, to seven eighths of the tokens. What the fit leaves of the block's output on the last eighth, squared, is
its error. Blocks weigh by how much the loss feels of it. That is read off the second-order loss of their atomic experts one by one, as
HEAPr has it, `1/2 sum h^2 (dL/dh)^2`, which is half the mean squared gradient in the directions that the block writes in, times
what these write: divided by the squared output of the same atomic experts, it is the loss of one unit of squared output error.

    increase = sum over blocks of  1/2 sum_k mean(h_k^2) mean((dL/dh_k)^2) / sum_k mean(h_k^2 |w_k|^2)  *  mean |y - fit|^2
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..planning.plan import PruningPlan
from ..planning.rectangles import rectangles
from ..utils.logging import get_logger, progress
from .block_compensation import BlockFit
from .fit_files import description_of_fits
from .layer_by_layer import calls_of, walk_through
from .portion import Portion
from .rerouting import Rerouting


if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..calibration.statistics import AtomicStatistics, BlockStatistics
    from ..configuration import HeaprConfig
    from ..layerwise.decoder import Decoder
    from ..planning.rectangles import Rectangle
    from ..text.samples import CalibrationData


logger = get_logger(__name__)

ROUNDED = 0.005
"""Of a ratio, that less goes without a word."""
HELD_OUT = 8
"""One token of so many is measured on, and not fitted to."""


def best_rectangle(
    decoder: Decoder,
    data: CalibrationData,
    statistics: AtomicStatistics,
    config: HeaprConfig,
    activation_memory: int | None = None,
    accelerator: Accelerator | None = None,
) -> PruningPlan:
    """The plan for the number of experts, and the width, that lose least; it says what it was chosen from.

    Args:
        decoder, data, statistics, activation_memory, accelerator: as of [`measure_rectangles`].
        config (`HeaprConfig`): with `num_experts="auto"`.
    """
    configs = rectangles(statistics, config)
    with tempfile.TemporaryDirectory(prefix="heapr-") as folder:
        increases = measure_rectangles(
            decoder, data, statistics, configs, Path(folder), activation_memory, accelerator
        )
    plan = PruningPlan.build(statistics, configs[min(increases, key=increases.get)])
    plan.rectangles = [
        {"experts": experts, "width": width, "increase": increase} for (experts, width), increase in increases.items()
    ]
    goal, asked = config.goal
    if goal == "ratio" and plan.ratio < asked - ROUNDED:
        logger.warning(
            "num_experts='auto': %.2f %% go where ratio=%s was asked, as the width of all experts is rounded up to a multiple; name a "
            "number of experts, or a target size, to get nearer",
            100 * plan.ratio,
            asked,
        )
    return plan


@torch.no_grad()
def measure_rectangles(
    decoder: Decoder,
    data: CalibrationData,
    statistics: AtomicStatistics,
    configs: dict[Rectangle, HeaprConfig],
    folder: Path,
    activation_memory: int | None = None,
    accelerator: Accelerator | None = None,
) -> dict[Rectangle, float]:
    """Estimated increase of the loss under each, nats a token: good for comparing them, as layers are added up.

    Args:
        decoder (`Decoder`): the layers of the unpruned model; only one needs its weights at a time.
        data (`CalibrationData`): what the statistics were measured on.
        statistics (`AtomicStatistics`): of the model.
        configs (`dict[Rectangle, HeaprConfig]`): from [`~optimum_heapr.planning.rectangles.rectangles`].
        folder, activation_memory, accelerator: as of `compensate_together`, which shares the text out in the same way.

    Raises:
        HeaprError: as there.
    """
    plans = {key: PruningPlan.build(statistics, config) for key, config in configs.items()}
    reroutings = {key: Rerouting.of(decoder.model, decoder.blocks, plan) for key, plan in plans.items()}
    config, increases = next(iter(configs.values())), dict.fromkeys(plans, 0.0)
    portion = Portion(data, config.batch_size, accelerator)
    dtype = decoder.blocks[0].module.down_proj.dtype
    portion.check_same({str(key): description_of_fits(plan, data, dtype) for key, plan in plans.items()})
    first = portion.tokens - max(portion.tokens // HELD_OUT, 1)
    own_first = min(max(first - portion.first, 0), portion.here)
    walk = walk_through(decoder, portion, folder, activation_memory)
    last = max(number for number in range(len(decoder.layers)) if decoder.blocks_of(number))
    for number in progress(range(last + 1), desc="Choosing num_experts", unit="layer"):
        with decoder.layer(number, then=number + 1 if number < last else None) as layer:
            called = calls_of(walk, number, layer, reroutings, portion)
            for block in decoder.blocks_of(number):
                inputs = called.pop(block.path)
                loss = _loss_of_atomic_experts(statistics.blocks[block.path]) / statistics.num_tokens
                for key, plan in plans.items():
                    rerouting = inputs.rerouting(key)
                    kept = plan.kept[block.path]
                    fit = BlockFit(block, inputs, kept, config.ridge, rerouting, portion.added, fitted=own_first)
                    error = fit.held_out_error() / (portion.tokens - first)
                    if fit.atomic_energy:
                        increases[key] += loss * error / (fit.atomic_energy / portion.tokens)
    walk.drop(walk.stream, last + 1)
    return increases


def _loss_of_atomic_experts(block: BlockStatistics) -> float:
    """The second-order increase of the loss that removing each atomic expert alone makes, added up; nats over all tokens."""
    return float((0.5 * block.activation_sq_sum.double() * block.mean("gradient_sq_sum")).sum())
