# Licensed under the Apache License, Version 2.0
"""What a preset of targets means in a model: which modules and parameters LoRA is put on, found by structure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..surgery.linear import linear_expert_layers
from ..utils.errors import HeaprError


if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from .configuration import RecoveryConfig


def adapter_config(model: nn.Module, config: RecoveryConfig) -> PeftConfig:
    """PEFT's description of the adapter.

    Linear layers and the packed parameters of routed experts get low-rank updates; where experts are linear layers, each of
    them does. Routers and norms are small: the
    adapter holds changed copies of them, by `modules_to_save`, or, as LoRA needs something of low rank, by PEFT's tuning
    of norms, which takes any module.

    Raises:
        HeaprError: if the model has nothing of what is to be trained.
    """
    from peft import LNTuningConfig, LoraConfig

    experts, linear = expert_paths(model), linear_expert_layers(model)
    chosen = {name: config.targets in (name, "all") for name in ("attention", "experts", "router")}
    modules = linear_paths(model, experts) if chosen["attention"] else []
    parameters = []
    if chosen["experts"]:
        modules += [layer for path in experts for layer in linear.get(path, [])]
        packed = (path for path in experts if path not in linear)
        parameters = [f"{path}.{name}" for path in packed for name in ("gate_up_proj", "down_proj")]
    saved = [*router_paths(model, experts), *norm_paths(model)] if chosen["router"] else []
    if not (modules or parameters or saved):
        raise HeaprError(
            f"targets={config.targets!r}: the model ({model.config.model_type}) has no such parameters, so nothing would be "
            "trained; use 'all'"
        )
    if not (modules or parameters):
        return LNTuningConfig(target_modules=saved, task_type="CAUSAL_LM")
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or 2 * config.rank,
        lora_dropout=config.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        modules_to_save=saved or None,
        task_type="CAUSAL_LM",
    )


def expert_paths(model: nn.Module) -> list[str]:
    """Paths of the modules of routed experts, pruned or not, in either form."""
    linear = linear_expert_layers(model)
    return [path for path, module in model.named_modules() if path in linear or _is_experts(module)]


def _is_experts(module: nn.Module) -> bool:
    return {"gate_up_proj", "down_proj"} <= {name for name, _ in module.named_parameters(recurse=False)}


def linear_paths(model: nn.Module, experts: list[str]) -> list[str]:
    """Paths of the linear layers but the head, the routers and what is inside expert modules."""
    from torch import nn

    left_out = {*router_paths(model, experts)}
    head = model.get_output_embeddings()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and path not in left_out
        and min(module.weight.shape) > 1  # a gate of one output has nothing of low rank to gain
        and not any(path.startswith(f"{block}.") for block in experts)
    ]


def router_paths(model: nn.Module, experts: list[str]) -> list[str]:
    """Paths of the routers: beside an experts module, what has a weight of one row an expert."""
    found = []
    for path in experts:
        parent, _, own = path.rpartition(".")
        count = model.get_submodule(path).num_experts
        for name, module in model.get_submodule(parent).named_children():
            weight = getattr(module, "weight", None)
            if name != own and weight is not None and weight.dim() == 2 and weight.shape[0] == count:
                found.append(f"{parent}.{name}")
    return found


def norm_paths(model: nn.Module) -> list[str]:
    """Paths of the norms: leaf modules whose only parameters are vectors, a weight and perhaps a bias."""
    from torch import nn

    return [
        path
        for path, module in model.named_modules()
        if not list(module.children())
        and {name for name, _ in module.named_parameters()} in ({"weight"}, {"weight", "bias"})
        and isinstance(module.weight, nn.Parameter)
        and module.weight.dim() == 1
    ]
