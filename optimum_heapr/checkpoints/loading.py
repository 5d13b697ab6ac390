# Licensed under the Apache License, Version 2.0
"""Loads the models that are measured, pruned and compared, or only their shapes."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..calibration.statistics import AtomicStatistics
from ..configuration import MEMORY
from ..experts import find_expert_blocks
from ..hub.statistics import load_statistics, measured_before
from ..utils.companions import STATISTICS_NAME
from ..utils.errors import HeaprError, did_you_mean, reason_of
from ..utils.logging import get_logger, without_warnings
from ..utils.quantized import check_known, is_dequantizing, quantization_of, set_dequantizing
from .origins import base_of_adapter, hub_options_in, load_configuration, not_installed, place_of
from .tensor_parallel import check_spreading, is_spread, spreading_options


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..calibration.estimate import MemoryEstimate
    from ..configuration import HeaprConfig
    from ..layerwise.source import SourceCheckpoint


logger = get_logger(__name__)


def load_measured(
    name: str | os.PathLike,
    statistics: AtomicStatistics | str | os.PathLike | None = None,
    reuse: bool = True,
    **model_options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, AtomicStatistics | None]:
    """Loads a model to be pruned, its tokenizer, and statistics that were measured before.

    Args:
        name (`str`): as for [`load_model`].
        statistics (`AtomicStatistics` or `str`, *optional*): as for [`~optimum_heapr.hub.statistics.load_statistics`].
        reuse (`bool`): without `statistics`, use those beside the model if there are any, or leave them if they are of
            another one.
        model_options: as for [`load_model`].

    Raises:
        HeaprError: if the model cannot be loaded, or `statistics` cannot be read or are of another model.
    """
    hub_options = hub_options_in(model_options)
    measured, source = load_statistics(statistics, hub_options), name
    if measured is None and reuse:
        source, measured = measured_before(name, hub_options)
        if source != os.fspath(name):  # what says where the one model is says nothing about another
            model_options = {
                key: value for key, value in model_options.items() if key not in ("revision", "subfolder")
            }
    model, tokenizer = load_model(source, **model_options)
    if measured is not None:
        try:
            measured.check_model(model, find_expert_blocks(model))
        except HeaprError as error:
            if statistics is not None or source != os.fspath(name):
                raise
            logger.warning(f"{name}: {STATISTICS_NAME} beside it is not used ({error})")
            measured = None
        else:
            logger.info(f"{name}: {measured.num_tokens:,} tokens were measured before")
    return model, tokenizer, measured


def load_model(
    name: str | os.PathLike, allow_quantized: bool = False, skeleton: bool = False, **model_options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Loads a model with a head, and its tokenizer if it has one.

    Args:
        name (`str`): a folder, the name of a repository on the Hub, or `demo` for the embedded model; where it holds an
            adapter of recovery, that is put on the model that it was trained on.
        allow_quantized (`bool`): load quantized weights as they are; they cannot be pruned.
        skeleton (`bool`): leave the model without storage, on the meta device; only headers of weight files are read.
        model_options: passed to `from_pretrained`, but for `dequantize`, to load a quantized checkpoint with its weights turned
            into floating-point numbers, and `tp_plan`, `auto` or `experts`: how to split it over processes.

    Raises:
        HeaprError: if there is no such model, its type is unknown, it has no head, its weights cannot be read or are
            quantized, or its devices or what it needs to be installed are not there.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    from ..modeling.modeling_heapr import auto_class_name
    from .completeness import check_scales
    from .skeleton import empty_model, load_skeleton

    path = place_of(name)
    if not allow_quantized and model_options.get("quantization_config") is not None:
        raise HeaprError(
            "quantization_config: quantized weights cannot be cut; leave it out, prune, and quantize what is saved"
        )
    hub_options, as_stored = hub_options_in(model_options), {}
    if "trust_remote_code" in model_options:
        hub_options["trust_remote_code"] = model_options["trust_remote_code"]
    try:
        base = base_of_adapter(path, hub_options)
        if base is not None and is_spread(model_options):
            raise HeaprError(
                f"model={str(name)!r}: holds an adapter, which is put on a model that one process has; merge it into that model, or "
                "load it without tp_plan"
            )
        config = load_configuration(name, **hub_options)
        auto_class = getattr(transformers, auto_class_name(type(config)))
        dequantize, tp_plan = model_options.pop("dequantize", False), model_options.pop("tp_plan", None)
        as_stored = {} if dequantize else quantization_of(config)
        if tp_plan is not None:
            trust = {key: value for key, value in hub_options.items() if key == "trust_remote_code"}
            model_options |= spreading_options(auto_class, config, str(name), tp_plan, **trust)
        options = {"dtype": "auto", **model_options}
        if (dequantize or not allow_quantized) and set_dequantizing(config, str(name), dequantize):
            check_scales(str(name), *empty_model(auto_class, config, base or path, **hub_options))
        elif as_stored:
            check_known(str(name), as_stored)
        elif dequantize and not allow_quantized:  # of several to evaluate some may be quantized
            logger.warning(f"model={str(name)!r}: dequantize=True changes nothing, as its weights are not quantized")
        if skeleton:
            model = load_skeleton(auto_class, config, path, str(name), **options)
        else:
            model = _load_weights(auto_class, config, path, str(name), base, options)
    except HeaprError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError) as error:
        raise HeaprError(
            f"model={str(name)!r}: cannot be loaded ({reason_of(error)}); name a folder or a repository on the Hub that holds a "
            "causal language model"
        ) from error
    except ImportError as error:
        raise not_installed(name, error) from error
    except (AssertionError, RuntimeError, NameError, TypeError) as error:
        if "negative dimension" in str(error):
            raise HeaprError(
                f"model={str(name)!r}: config.json names a size below 0 ({reason_of(error)}); copy the model again"
            ) from error
        # What reads such weights may want a GPU, or transformers miss a package without looking for it, or not know the method.
        if as_stored:
            raise HeaprError(
                f"model={str(name)!r}: its weights are quantized ({as_stored['quant_method']}), and cannot be loaded here "
                f"({reason_of(error)}); install what reads them, or go where they can be loaded"
            ) from error
        # Of PyTorch, about devices that are not there or are full.
        if isinstance(error, (NameError, TypeError)) or model_options.get("device_map") is None:
            raise
        raise HeaprError(
            f"device_map={model_options['device_map']!r}: the model cannot go there ({reason_of(error)}); name devices that are there "
            "and have room, such as 'auto', or leave it out"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **hub_options)
    except ImportError as error:
        raise not_installed(name, error) from error
    except (OSError, ValueError):
        tokenizer = None  # a model alone can still be calibrated on input_ids
    except (LookupError, TypeError, AttributeError) as error:
        raise HeaprError(
            f"model={str(name)!r}: its tokenizer cannot be loaded ({reason_of(error)}); copy its files again"
        ) from error
    if tokenizer is not None and len(tokenizer) <= len(tokenizer.all_special_tokens):
        tokenizer = None  # where a model comes without its files, transformers makes one that knows no text
    return model, tokenizer


def _load_weights(
    auto_class: type, config: PreTrainedConfig, path: str, name: str, base: str | None, options: dict[str, Any]
) -> PreTrainedModel:
    """A model with all of its weights or, where `path` holds an adapter of the model `base`, that one with the adapter on it.

    transformers loads both together as well, but tells of the adapter's missing weights alone then.
    """
    from .completeness import check_missing, load_complete, without_report
    from .skeleton import empty_model

    if base is None:
        changed = {"config": config} if is_dequantizing(config) else {}
        load = partial(auto_class.from_pretrained, path, **changed, **options)
        return load_complete(name, load, partial(empty_model, auto_class, config, path, **options))
    of_base = {key: value for key, value in options.items() if key not in ("revision", "subfolder")}
    model, of_adapter = _load_weights(auto_class, config, base, base, None, of_base), hub_options_in(options)
    with without_report():
        found = model.load_adapter(path, adapter_kwargs=of_adapter)
    check_missing(name, found.missing_keys, found.unexpected_keys)
    return model


def source_of(model: PreTrainedModel, **model_options: Any) -> SourceCheckpoint:
    """Where the weights of a model without storage are read from, piece by piece.

    Args:
        model (`PreTrainedModel`): from [`load_model`] with `skeleton=True`.
        model_options: those that it was loaded with.

    Raises:
        HeaprError: if its checkpoint cannot be read piece by piece.
    """
    from ..layerwise.source import SourceCheckpoint
    from ..utils.tensor_files import checkpoint_files

    return SourceCheckpoint(model, checkpoint_files(model.config._name_or_path, **hub_options_in(model_options)))


def options_for_memory(memory: str, model_options: dict[str, Any]) -> dict[str, Any]:
    """Options of [`load_model`] with which a model is as `memory` says: `plain`, `offload` or `streaming`.

    Raises:
        HeaprError: if a `device_map` is given for `streaming`.
    """
    if memory == "offload":
        return {"device_map": "auto", **model_options}
    if memory == "streaming":
        if model_options.get("device_map") is not None:
            raise HeaprError(
                f"device_map={model_options['device_map']!r}: memory='streaming' takes one layer at a time to where it computes; "
                "leave it out, or pass memory='offload'"
            )
        kept_out = ("device_map", "offload_folder")
        return {"skeleton": True, **{key: value for key, value in model_options.items() if key not in kept_out}}
    return model_options


def choose_memory(
    name: str | os.PathLike,
    config: HeaprConfig,
    memory: str = "auto",
    activation_memory: int | None = None,
    **model_options: Any,
) -> tuple[str, MemoryEstimate | None]:
    """How to calibrate a model, and what that takes, before anything is loaded.

    What fits is loaded whole. What does not is calibrated layer by layer, or, where its layers need more than hidden states
    of one another, with its weights offloaded.

    Args:
        name (`str`): as for [`load_model`].
        config (`HeaprConfig`): its calibration part is used.
        memory (`str`): `plain`, `offload` or `streaming`, or `auto` for what the estimate says.
        activation_memory (`int`, *optional*): bytes of layer inputs on the host, for `streaming`.
        model_options: as for [`load_model`].

    Returns:
        `tuple[str, MemoryEstimate | None]`: `plain`, `offload` or `streaming`; and no estimate where none is asked for, or
        sizes cannot be read.

    Raises:
        HeaprError: if `memory` is none of these.
    """
    if memory not in MEMORY:
        raise HeaprError(f"memory={memory!r}: must be one of {', '.join(MEMORY)}{did_you_mean(memory, MEMORY)}")
    check_spreading(memory, model_options)
    # Where the weights go is said already.
    if memory == "plain" or (memory == "auto" and ("device_map" in model_options or is_spread(model_options))):
        return "plain", None
    from ..calibration.estimate import MemoryEstimate
    from ..layerwise.layers import check_layers

    try:
        with without_warnings():  # the loading that follows says what is wrong
            model, _ = load_model(name, skeleton=True, **{**model_options, "device_map": None})
        estimate = MemoryEstimate.of(model, config)
    except HeaprError:
        # Sizes are read from safetensors; what else can be loaded, or why it cannot be, is for the loading to say.
        return "plain" if memory == "auto" else memory, None
    if memory == "auto" and not estimate.fits:
        memory = "streaming"
        try:
            check_layers(model, source_of(model, **model_options))
        except HeaprError as error:
            logger.warning("%s", error)
            memory = "offload"
    memory = "plain" if memory == "auto" else memory
    if memory == "streaming":
        return memory, MemoryEstimate.of(model, config, memory, activation_memory)
    return memory, replace(estimate, mode=memory)
