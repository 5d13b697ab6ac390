# Licensed under the Apache License, Version 2.0
"""Folders of pruned models: what stands beside the weights, and pruning from folder to folder without loading the model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.processes import connected_processes
from ..calibration.statistics import AtomicStatistics
from ..hub.base_model import BaseModel
from ..hub.card import write_card
from ..hub.statistics import load_statistics
from ..planning.plan import PruningPlan
from ..report.content import build_report
from ..report.files import write_report
from ..report.observation import observe
from ..surgery.fit_files import remove_fits, say_unused_fits
from ..text.samples import load_calibration_data
from ..utils.companions import PLAN_NAME, own_folder
from ..utils.errors import HeaprError, did_you_mean
from ..utils.files import folder_beside, replace_folder
from ..utils.sizes import parse_size
from .loading import hub_options_in, load_model
from .originals import carry_over
from .requantizing import check_requantizing
from .requantizing import requantize as put_into_fp8


if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..configuration import HeaprConfig
    from ..surgery.fitted import FittedFiles
    from ..text.samples import CalibrationData


FORMS = ("packed", "linear")
"""How a checkpoint of variable widths holds its experts once it is loaded: see `PrunedConfigMixin`."""


def apply_streaming(
    model: str | os.PathLike,
    plan: PruningPlan | str | os.PathLike,
    folder: str | os.PathLike,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    statistics: AtomicStatistics | str | os.PathLike | None = None,
    experts_as: str = "packed",
    fits_path: str | os.PathLike | None = None,
    requantize: bool = False,
    **model_options: Any,
) -> Path:
    """Prunes a checkpoint file by file, for models of any size: memory is needed for one expert or one other tensor.

    The result is the one that [`~optimum_heapr.HeaprPruner.apply`] and
    [`~optimum_heapr.HeaprPruner.save_pretrained`] write, byte for byte, or with compensation up to the rounding of sums.
    Compensation over blocks and reconstruction are shared by all processes that are connected, and the first of them writes: then
    it is to be called on each.

    Args:
        model (`str`): a folder, the name of a repository on the Hub, or `demo`; its weights must be safetensors.
        plan (`PruningPlan` or `str`): what stays.
        folder (`str`): appears whole or not at all.
        overwrite (`bool`): replace a folder that this package wrote, if it holds nothing else.
        max_shard_size (`int` or `str`): largest weight file.
        statistics (`AtomicStatistics` or `str`, *optional*): needed if the plan asks for compensation within experts; over
            blocks, the calibration text that the plan names is read again.
        experts_as (`str`): `packed`, or `linear` for a checkpoint that loads with its experts as linear layers.
        fits_path (`str`, *optional*): folder to keep each block that was compensated over or trained in; a run that was ended
            goes on from those that it finds there. They go once the output is there.
        requantize (`bool`): write in FP8 what is in FP8 in `model`, as [`~optimum_heapr.HeaprPruner.save_pretrained`].
        model_options: as for [`~optimum_heapr.HeaprPruner.from_pretrained`], without `device_map`.

    Raises:
        HeaprError: if the plan was made for another model, or the checkpoint cannot be cut file by file.
    """
    plan = plan if isinstance(plan, PruningPlan) else PruningPlan.load(plan)
    statistics, size = load_statistics(statistics), parse_size("max_shard_size", str(max_shard_size))
    check_form(plan.config, experts_as)
    say_unused_fits(plan.config, fits_path)
    folder = Path(folder)
    options = {"max_shard_size": size, "experts_as": experts_as, "fits_path": fits_path, "requantize": requantize}
    accelerator = connected_processes() if plan.config.compensates_blocks else None
    if accelerator is not None and not accelerator.is_main_process:
        with folder_beside(folder) as work:
            fit_checkpoint(model, plan, work, model_options=model_options)
        return folder
    with replace_folder(folder, overwrite) as temporary:
        write_streaming(model, plan, temporary, statistics=statistics, model_options=model_options, **options)
    if fits_path is not None:
        remove_fits(fits_path)
    return folder


def check_form(config: HeaprConfig, experts_as: str, model: PreTrainedModel | None = None) -> None:
    """Refuses a form of experts that a checkpoint cannot be loaded in.

    Args:
        config (`HeaprConfig`): what it was or will be pruned by.
        experts_as (`str`): `packed` or `linear`.
        model (`PreTrainedModel`, *optional*): the model, once it is there; pruned or not.

    Raises:
        HeaprError: if there is no such form, the layout has no experts of variable widths, or its experts have biases.
    """
    if experts_as not in FORMS:
        raise HeaprError(
            f"experts_as={experts_as!r}: must be {' or '.join(map(repr, FORMS))}{did_you_mean(experts_as, FORMS)}"
        )
    if experts_as == "linear" and config.layout != "variable":
        raise HeaprError(
            f"experts_as='linear': is for layout='variable', and this is {config.layout!r}, which loads as the stock "
            "architecture does; leave it out"
        )
    if experts_as == "linear" and model is not None and any(getattr(m, "has_bias", False) for m in model.modules()):
        raise HeaprError("experts_as='linear': experts of this family have biases, which stay packed; leave it out")


def write_streaming(
    model: str | os.PathLike,
    plan: PruningPlan,
    folder: Path,
    *,
    statistics: AtomicStatistics | None = None,
    model_options: dict[str, Any] | None = None,
    results: Sequence[EvalResult] = (),
    max_shard_size: int | str = "5GB",
    experts_as: str = "packed",
    fits_path: Path | None = None,
    requantize: bool = False,
    fitted: FittedFiles | None = None,
) -> None:
    """What [`apply_streaming`] does, into an empty folder; without fitting if that was done by [`fit_checkpoint`]."""
    from ..utils.tensor_files import checkpoint_files
    from .cutting import stream_plan

    model_options = model_options or {}
    if requantize:
        check_requantizing(plan.config, model, plan, **model_options)
    skeleton, tokenizer = load_model(model, skeleton=True, **model_options)
    check_form(plan.config, experts_as, skeleton)
    files = checkpoint_files(skeleton.config._name_or_path, **hub_options_in(model_options))
    base = BaseModel.of(skeleton, hub_options_in(model_options))
    before = observe(skeleton, plan.tokens)
    if experts_as != "packed":
        skeleton.config.experts_as = experts_as
    with ExitStack() as until_written:
        if plan.config.compensates_blocks and fitted is None:
            work = until_written.enter_context(tempfile.TemporaryDirectory(prefix=".compensation-", dir=folder))
            fitted = fit_checkpoint(model, plan, Path(work), fits_path=fits_path, model_options=model_options)
        stream_plan(skeleton, files, plan, folder, max_shard_size, statistics, fitted)
    report = build_report(plan, base.name, before, observe(skeleton, plan.routed_tokens))
    save_companions(folder, skeleton, tokenizer, plan, base, report, results)
    if requantize:
        put_into_fp8(folder, plan, skeleton.config._name_or_path, **model_options)


def fit_checkpoint(
    model: str | os.PathLike,
    plan: PruningPlan,
    work: Path,
    data: CalibrationData | None = None,
    activation_memory: int | None = None,
    fits_path: Path | None = None,
    model_options: dict[str, Any] | None = None,
) -> FittedFiles:
    """[`~optimum_heapr.checkpoints.cutting.fit_streaming`] for the name of a model; by default to the text that the plan names."""
    from ..utils.tensor_files import checkpoint_files
    from .cutting import fit_streaming

    model_options = model_options or {}
    skeleton, tokenizer = load_model(model, skeleton=True, **model_options)
    files = checkpoint_files(skeleton.config._name_or_path, **hub_options_in(model_options))
    data = load_calibration_data(plan.config, tokenizer) if data is None else data
    return fit_streaming(skeleton, files, plan, data, work, activation_memory, fits_path)


def save_companions(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: PruningPlan,
    base: BaseModel,
    report: dict[str, Any],
    results: Sequence[EvalResult] = (),
) -> None:
    """Writes what stands beside the weights of a pruned model; names, but no paths of this machine."""
    carry_over(folder, model, tokenizer, base, is_stock=plan.config.layout != "variable")
    plan = plan.public()
    ours = own_folder(folder)
    plan.config.save_pretrained(ours)
    plan.save(ours / PLAN_NAME)
    write_report(ours, report)
    write_card(folder, model, plan, base, results, report)
