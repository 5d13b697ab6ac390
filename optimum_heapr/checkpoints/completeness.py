# Licensed under the Apache License, Version 2.0
"""Refuses a checkpoint that lacks weights: transformers would make them up from random numbers, and only log it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..layerwise.source import parameters_of
from ..utils.errors import HeaprError
from ..utils.logging import get_logger
from .prediction_layers import leave_out, prefix_of


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..utils.tensor_files import TensorInfo


logger = get_logger(__name__)

_SHOWN = 4  # names of each kind in a message
_INDEX = re.compile(r"(?<=\.)\d+(?=\.(?!.*\.\d+\.))")  # the last number of a name: that of the expert

# What is stored for one weight: in FP8 and MXFP4, and in the formats of compressed-tensors.
_WEIGHT = re.compile(r"(weight|weight_packed|blocks)\$?$")
_SCALE = re.compile(r"(weight_scale_inv|qscale_weight|weight_scale|scales?)\$?$")
_PACKED, _UNPACKED = re.compile(r"weight_packed$"), re.compile(r"\.weight$")
_BESIDE = re.compile(r"(weight_(shape|zero_point|global_scale)|activation_scale)\$?$")


def load_complete(
    name: str,
    load: Callable[..., tuple[PreTrainedModel, dict[str, Any]]],
    empty: Callable[[], tuple[PreTrainedModel, dict[str, TensorInfo]]],
) -> PreTrainedModel:
    """A model all of whose weights are in its checkpoint; those that are tied to others, or made anew each time, need not be.

    Args:
        name (`str`): what the user called the model.
        load (`Callable`): loads it; called with `output_loading_info=True` for `from_pretrained`.
        empty (`Callable`): gives the model without storage, and what its checkpoint holds, to look for what is wrong once
            loading has failed.

    Raises:
        HeaprError: naming the tensors that are missing, and those that belong to nothing.
    """
    try:
        with without_report():
            model, found = load(output_loading_info=True)
    except RuntimeError as error:
        if "above report" not in str(error):
            raise
        missing, misfits = _look(*empty())
        check_missing(name, missing)
        reason = f" ({_listed(misfits)})" if misfits else ""
        raise HeaprError(
            f"model={name!r}: its weights do not have the shapes that its config.json says{reason}; name a checkpoint whose "
            "files belong together"
        ) from error
    config = model.config.get_text_config()
    others = [key for key in found["unexpected_keys"] if not prefix_of(key, config.num_hidden_layers)]
    check_missing(name, found["missing_keys"], others)
    # Those that the class of the model knows of, it leaves out of what is unexpected.
    if len(others) < len(found["unexpected_keys"]) or model._keys_to_ignore_on_load_unexpected:
        try:
            stored = empty()[1]
        except HeaprError:  # no safetensors, whose names are not to be had without loading them
            stored = found["unexpected_keys"]
        model.left_out = leave_out(model, stored)
        if model.left_out:
            logger.warning(f"{name}: {model.left_out}")
    return model


@contextmanager
def without_report() -> Iterator[None]:
    """Leaves out the table of many lines that transformers logs of what is missing, for here it is read and acted on."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "integrations.peft")]
    for each in loggers:
        each.addFilter(keep)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(keep)


def check_missing(name: str, missing: Iterable[str], unexpected: Iterable[str] = ()) -> None:
    """Refuses a checkpoint without some of the tensors of its model; of one that has others besides, a warning says so.

    Raises:
        HeaprError: naming them, and what the checkpoint has in their place.
    """
    missing, unexpected = sorted(missing), sorted(unexpected)
    if not missing:
        if unexpected:
            logger.warning(
                f"{name}: {len(unexpected)} of its tensors belong to nothing in the model: {_listed(unexpected)}"
            )
        return
    unused = f"; {len(unexpected)} in it belong to nothing: {_listed(unexpected)}" if unexpected else ""
    raise HeaprError(
        f"model={name!r}: its checkpoint lacks {len(missing)} of its tensors: {_listed(missing)}{unused}; download it again, "
        "or name one that is whole"
    )


def check_scales(name: str, model: PreTrainedModel, tensors: dict[str, TensorInfo]) -> None:
    """Refuses a quantized checkpoint without some of the scales of its weights, or with scales of other weights.

    Args:
        name (`str`): what the user called the model.
        model (`PreTrainedModel`): without storage, from [`~optimum_heapr.checkpoints.skeleton.empty_model`].
        tensors (`dict[str, TensorInfo]`): what its checkpoint holds.

    Raises:
        HeaprError: naming the tensors.
    """
    block = model.config.quantization_config.get("weight_block_size")
    alone, misfits = [], []
    for by_pattern in parameters_of(model, tensors, model._weight_conversions)[1].values():
        names = [tensor for of_pattern in by_pattern.values() for tensor in of_pattern]
        names = [tensor for tensor in names if not _BESIDE.search(tensor)]
        scales = {_SCALE.sub("", tensor): tensor for tensor in names if _SCALE.search(tensor)}
        for weight in sorted(set(names) - set(scales.values())):
            stored, scale = tensors[weight], scales.get(_WEIGHT.sub("", weight))
            if (stored.dtype.itemsize == 1 or weight.endswith("_packed")) != (scale is not None):
                alone.append(weight)
            elif scale is not None and not _fit(stored, tensors[scale], block):
                misfits.append(f"{weight} {list(stored.shape)} and {scale} {list(tensors[scale].shape)}")
    if alone:
        raise HeaprError(
            f"model={name!r}: {len(alone)} of its weights are quantized and have no scales that transformers finds, or are not "
            f"and have some: {_listed(alone)}; download it again, or name the checkpoint in bfloat16 that it was made from"
        )
    if misfits:
        raise HeaprError(
            f"model={name!r}: {len(misfits)} of its quantized weights have scales of other shapes: {_listed(misfits)}; "
            "download it again, or name one whose files belong together"
        )


def _fit(weight: TensorInfo, scale: TensorInfo, block: list[int] | None) -> bool:
    """Whether scales are those of a weight: one, one for each block, or one for the bytes that the last dimension holds."""
    if weight.dtype == torch.uint8:
        return weight.shape[:-1] == scale.shape
    if block is None or torch.Size(scale.shape).numel() == 1 or weight.dtype == torch.int8:
        return True
    grid = tuple(-(-size // step) for size, step in zip(weight.shape[-2:], block))
    return scale.shape == (*weight.shape[:-2], *grid)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _look(model: PreTrainedModel, tensors: dict[str, TensorInfo]) -> tuple[list[str], list[str]]:
    """Which parameters are missing, or tensors of those that make one together, and which have another shape than theirs."""
    state, widths = model.state_dict(), getattr(model.config, "expert_widths", None) or {}
    converters, stored = parameters_of(model, tensors, model._weight_conversions)
    ignored = [*model.all_tied_weights_keys, *(model._keys_to_ignore_on_load_missing or ())]
    missing = [name for name in state if name not in stored and not any(re.search(entry, name) for entry in ignored)]
    misfits = []
    for parameter, by_pattern in stored.items():
        if parameter in converters:
            path = parameter.rpartition(".")[0]
            experts = len(widths[path]) if path in widths else len(state[parameter])
            # Scales may be there or not; `check_scales` knows. So may one of two names of a weight.
            patterns = converters[parameter].source_patterns
            packed = any(_PACKED.search(entry) for entry in by_pattern)
            others = (_SCALE, _BESIDE, _UNPACKED if packed else _PACKED)
            patterns = [entry for entry in patterns if not any(other.search(entry) for other in others)]
            of_weights = {entry: by_pattern[entry] for entry in patterns if entry in by_pattern}
            missing += _absent(of_weights, patterns, experts)
            continue
        ((name,),) = by_pattern.values()
        if tensors[name].shape != tuple(state[parameter].shape):
            misfits.append(f"{name} {list(tensors[name].shape)}, not {list(state[parameter].shape)}")
    return missing, misfits


def _absent(by_pattern: dict[str, list[str]], patterns: list[str], experts: int) -> Iterator[str]:
    """Names that ought to be there, of tensors that are stored one an expert."""
    each = {pattern: names for pattern, names in by_pattern.items() if "*" in pattern}
    if not each:
        return
    present = {name for names in each.values() for name in names}
    pattern, (name, *_) = next(iter(each.items()))
    for other in patterns:
        # Names of one expert differ in what follows its number.
        like = name.removesuffix(pattern.split("*")[-1].rstrip("$")) + other.split("*")[-1].rstrip("$")
        if "*" in other:
            expected = (_INDEX.sub(str(expert), like) for expert in range(experts))
            yield from (tensor for tensor in expected if tensor not in present)
