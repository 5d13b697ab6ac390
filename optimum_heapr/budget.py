# Licensed under the Apache License, Version 2.0
"""The largest cut within a budget of loss: a search over plans, each a look-up, that measures a few of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .evaluation.perplexity import evaluation_windows
from .experts import find_expert_blocks
from .measuring import Measure, loss_measure
from .planning.errors import UnreachableRatio
from .planning.plan import PruningPlan
from .text.samples import load_calibration_data
from .utils.errors import HeaprError
from .utils.logging import get_logger
from .utils.placement import place
from .utils.positions import warn_of_positions


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .calibration.statistics import AtomicStatistics
    from .configuration import HeaprConfig
    from .text.samples import CalibrationData


logger = get_logger(__name__)

MEASUREMENTS = 8
RESOLUTION = 0.004  # of the ratio: what eight halvings leave
ENOUGH = 0.95  # of the budget: no need to come nearer


@dataclass(frozen=True)
class _End:
    """One end of the range that the ratio is known to lie in.

    Attributes:
        ratio (`float`): asked for.
        reached (`float`): by the plan.
        loss (`float`): increase and one standard error, nats a token.
        error (`float`): that standard error.
        plan (`PruningPlan`, *optional*): that was measured.
    """

    ratio: float
    reached: float
    loss: float
    error: float = 0.0
    plan: PruningPlan | None = None


def largest_cut(statistics: AtomicStatistics, config: HeaprConfig, measure: Measure) -> PruningPlan:
    """The plan that removes most while what it measurably costs is within `config.max_loss_increase`.

    It costs what was measured and one standard error on top: on other text of the kind it is then within the budget about five
    times in six, where the mean alone would be every other time. The range of ratios is cut where a straight line
    through the logarithms of the losses at its ends meets the budget, and halved where that left most of it, or
    an end was not measured. At most `MEASUREMENTS` plans are measured, and no more once the ends differ by less than their error:
    what lies between them cannot be told apart.

    Args:
        statistics (`AtomicStatistics`): of the model that is measured.
        config (`HeaprConfig`): `max_loss_increase` is set.
        measure (`Callable`): such as [`~optimum_heapr.measuring.loss_measure`] gives.

    Returns:
        `PruningPlan`: with what was measured in `search`.

    Raises:
        HeaprError: if the least that can be removed costs more, or an option is wrong.
    """
    budget, search, halves = config.max_loss_increase, [], True
    low, high = _End(0.0, 0.0, 0.0), _End(1.0, 1.0, math.inf)
    while (
        high.ratio - low.ratio > RESOLUTION
        and not _alike(low, high)
        and len(search) < MEASUREMENTS
        and low.loss < ENOUGH * budget
    ):
        found = _plan_between(statistics, config, low, high, 0.5 if halves else _share(budget, low, high))
        if found is None:
            break
        ratio, plan = found
        if plan.ratio <= low.reached:  # widths are rounded
            low = replace(low, ratio=ratio)
            continue
        if plan.ratio >= high.reached:
            high = replace(high, ratio=ratio)
            continue
        increase, error = measure(plan)
        search.append({"ratio": plan.ratio, "increase": increase, "error": error})
        logger.info("%.2f %% removed: loss + %.5f +- %.5f nats a token", 100 * plan.ratio, increase, error)
        end = _End(ratio, plan.ratio, increase + error, error, plan)
        before = high.ratio - low.ratio
        low, high = (end, high) if end.loss <= budget else (low, end)
        halves = high.ratio - low.ratio > 0.8 * before
    if low.plan is None:
        least = min(search, key=lambda point: point["ratio"])
        raise HeaprError(
            f"max_loss_increase={budget}: removing {least['ratio']:.2%} already costs {least['increase']:.5f} +- "
            f"{least['error']:.5f} nats a token; allow more, or change the criterion or the layout"
        )
    return replace(low.plan, config=config, search=search)


def check_in_memory(config: HeaprConfig, is_in_memory: bool) -> None:
    """Refuses `max_loss_increase` where the weights are not there to be measured with.

    Raises:
        HeaprError: saying what to ask for instead.
    """
    if config.max_loss_increase is not None and not is_in_memory:
        raise HeaprError(
            f"max_loss_increase={config.max_loss_increase}: plans are measured with the model in memory, and here it is read "
            "layer by layer; name a ratio, or pass memory='plain'"
        )


def plan_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    statistics: AtomicStatistics,
    config: HeaprConfig,
    data: CalibrationData | None = None,
) -> PruningPlan:
    """The plan that a config asks for, whichever way it says how much goes.

    For `max_loss_increase` plans are measured, on text that neither calibration nor the report of the result sees: what
    `config.dataset` has beyond both, or the windows of `config.eval_dataset` behind those of the report.

    Args:
        model (`PreTrainedModel`): unpruned, in memory.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the model.
        statistics (`AtomicStatistics`): what plans are made from, and with `compensate` compensated with.
        config (`HeaprConfig`): what was asked for.
        data (`CalibrationData`, *optional*): what was calibrated on, if that is at hand.

    Raises:
        HeaprError: if it cannot be reached, or there is no such text.
    """
    if config.max_loss_increase is None:
        plan = PruningPlan.build(statistics, config)
        plan.warn_of_widths()
        return plan
    check_in_memory(config, find_expert_blocks(model)[0].module.down_proj.device.type != "meta")
    goal, count = f"max_loss_increase={config.max_loss_increase}", config.eval_samples
    needs_text = config.compensates_blocks or config.eval_dataset is None
    if config.dataset is not None and needs_text and (data is None or not (data.search or config.eval_dataset)):
        data = load_calibration_data(config, tokenizer)
    if config.eval_dataset is not None:
        source = config.eval_dataset
        windows = evaluation_windows(tokenizer, source, config.seq_length, 2 * count)[count:]
        if not windows:
            raise HeaprError(
                f"{goal}: eval_dataset={source!r} has no text beyond the {count} windows of the report; lower eval_samples"
            )
    elif data is not None and data.search:
        source, windows = data.source, data.search
        if data.fingerprint["sha256"] != statistics.fingerprint["data"]["sha256"]:
            logger.warning("%s: the statistics are of other text, and may be of some that is measured on", source)
    else:
        raise HeaprError(
            f"{goal}: no text was held out to measure on; name some with eval_dataset, or, before calibrating, ask for this "
            "increase already and name a dataset that has more text than the samples"
        )
    place(model)
    warn_of_positions(model, windows)
    plan = largest_cut(statistics, config, loss_measure(model, windows, source, statistics, data))
    plan.warn_of_widths()
    return plan


def _alike(low: _End, high: _End) -> bool:
    """Whether both ends were measured, and differ by no more than their error."""
    measured = low.plan is not None and high.plan is not None
    return measured and high.loss - low.loss <= max(low.error, high.error)


def _share(budget: float, low: _End, high: _End) -> float:
    """How far into the range the budget is met, where the logarithm of the loss is linear; half where it is not known."""
    if not 0 < low.loss < high.loss < math.inf:
        return 0.5
    return min(max(math.log(budget / low.loss) / math.log(high.loss / low.loss), 0.1), 0.9)


def _plan_between(
    statistics: AtomicStatistics, config: HeaprConfig, low: _End, high: _End, share: float
) -> tuple[float, PruningPlan] | None:
    """A ratio within the range, as far into it as `share` says or nearby, and its plan; `None` if there is none."""
    ratio = low.ratio + share * (high.ratio - low.ratio)
    tried = set()
    while ratio not in tried:
        try:
            return ratio, PruningPlan.build(statistics, config.replace(ratio=ratio))
        except UnreachableRatio as error:
            tried.add(ratio)
            inside = [other for other in error.nearest if low.ratio < other < high.ratio]
            ratio = min(inside, key=lambda other: abs(other - ratio), default=ratio)
    return None
