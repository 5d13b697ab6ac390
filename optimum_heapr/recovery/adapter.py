# Licensed under the Apache License, Version 2.0
"""Adapters of recovery: which pruned model one belongs to, and putting it back on that model."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..experts import model_name
from ..fingerprint import hash_of_values
from ..utils.companions import RECOVERY_NAME, own_file
from ..utils.errors import HeaprError


if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


def check_pruned(model: PreTrainedModel) -> None:
    """Refuses a model that there is nothing to recover for.

    Raises:
        HeaprError: if it was not pruned by this package, or is in float16.
    """
    name = model_name(model)
    if not isinstance(getattr(model.config, "heapr_config", None), dict):
        raise HeaprError(f"model={name!r}: its config.json has no heapr_config; name a model that was pruned")
    if str(model.dtype) == "torch.float16":
        raise HeaprError(f"dtype=float16: training {name!r} in it overflows; use bfloat16 or float32")


def identity_of(model: PreTrainedModel) -> dict[str, Any]:
    """What tells one pruned model from another, in whatever precision it was loaded: its type and a hash of its weights."""
    return {"model_type": model.config.model_type, "weights": hash_of_values(model.parameters())}


def without_adapter(model: PeftModel) -> PreTrainedModel:
    """The model as it was. Of modules that are trained whole (norms, routers) PEFT's `unload` would leave the trained copies."""
    model.delete_adapter(model.active_adapter)
    return model.unload()


@contextmanager
def as_it_was_after_errors(model: PreTrainedModel) -> Iterator[list[PeftModel]]:
    """Takes an adapter off again if the block ends with an error, out of memory or an interruption for instance.

    Otherwise the model would go on with an adapter that was trained in part, and be saved under names that nothing reads.

    Args:
        model (`PreTrainedModel`): its modes and what of it is trained come back as well.

    Yields:
        `list[PeftModel]`: for what wraps the model.
    """
    training = {module: module.training for module in model.modules()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wrapped: list[PeftModel] = []
    try:
        yield wrapped
    except BaseException:
        for wrapper in wrapped:
            without_adapter(wrapper)
        for module, mode in training.items():
            module.training = mode
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
        raise


@torch.no_grad()
def interpolate(model: PeftModel, share: float) -> None:
    """Leaves a share of what training changed, in place: `W0 + share (W - W0)` for every weight (WiSE-FT, arXiv 2109.01903).

    An update of LoRA is linear in `B`; changed copies of routers and norms are moved towards what they are copies of.

    Args:
        model (`PeftModel`): an adapter of a recovery run, not merged.
        share (`float`): in (0, 1].
    """
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for update in module.lora_B.parameters():
                update.mul_(share)
        elif isinstance(module, ModulesToSaveWrapper):
            _move(module.modules_to_save, module.original_module, share)
        elif isinstance(module, LNTuningLayer):
            _move(module.ln_tuning_layers, module.base_layer, share)


def _move(copies: nn.ModuleDict, original: nn.Module, share: float) -> None:
    """Moves each copy towards the original, until it is `share` of its distance away."""
    for copy in copies.values():
        for trained, start in zip(copy.parameters(), original.parameters(), strict=True):
            trained.copy_(torch.lerp(start.to(trained), trained, share))


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike, is_trainable: bool = False) -> PeftModel:
    """`PeftModel.from_pretrained`, after a check that the adapter was trained on this very model.

    Args:
        model (`PreTrainedModel`): the pruned model; its layers are wrapped in place.
        folder (`str`): what a recovery run wrote.
        is_trainable (`bool`): leave the adapter open for training.

    Raises:
        HeaprError: if there is no adapter there, or it is of another model.
    """
    from peft import PeftModel

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise HeaprError(f"adapter={str(folder)!r}: holds no adapter_config.json; name what 'recover' wrote")
    report = own_file(folder, RECOVERY_NAME)
    if report.is_file():
        trained_on, ours = json.loads(report.read_text(encoding="utf-8"))["model"], identity_of(model)
        for name in ours:
            if trained_on[name] != ours[name]:
                raise HeaprError(
                    f"adapter={str(folder)!r}: was trained on a model with {name} {trained_on[name]}, this one has "
                    f"{ours[name]}; name the pruned model that it was trained on"
                )
    with known_warnings_of_peft():
        return PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)


@contextmanager
def known_warnings_of_peft() -> Iterator[None]:
    """Leaves out four warnings that say nothing about a run, and no other.

    PEFT asks models for a property that transformers renamed, and warns of each norm and router that it tunes. Adapters that reach
    no expert, or the packed ones of a layer together, are what `targets` asked for.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "adapters reach .* none of the routed experts", UserWarning)
        warnings.filterwarnings("ignore", "adapters of packed experts", UserWarning)
        warnings.filterwarnings("ignore", "Unsupported layer type '.*(Norm|Router|Gate)", UserWarning)
        yield
