# Licensed under the Apache License, Version 2.0
"""Says when an adapter leaves packed experts as they are. This file travels with pruned checkpoints."""

import warnings

from torch import nn

from .atomic_experts import AtomicExperts


def warn_of_experts_left_out(model: nn.Module, adapters: dict) -> None:
    """Warns if adapters that are to be trained reach layers of a model, but none of its packed experts.

    PEFT's `target_modules` finds layers, of which packed experts have none: a list that names them, or `all-linear`, then adapts
    attention alone, and PEFT says nothing.

    Args:
        model (`nn.Module`): after PEFT has put its layers in.
        adapters (`dict[str, PeftConfig]`): what PEFT was asked for, by name.
    """
    experts = {path: module for path, module in model.named_modules() if isinstance(module, AtomicExperts)}
    # What all layers of PEFT have; PEFT itself need not be there where a checkpoint goes.
    adapted = [path for path, module in model.named_modules() if hasattr(type(module), "adapter_layer_names")]
    if not experts or not adapted or all(config.inference_mode for config in adapters.values()):
        return
    # PEFT wraps a module whose parameters it adapts; what is trained whole it wraps as well, or leaves open.
    if any(path == own or path.startswith(f"{own}.") for own in adapted for path in experts):
        return
    if any(parameter.requires_grad for module in experts.values() for parameter in module.parameters()):
        return
    held = sum(parameter.numel() for module in experts.values() for parameter in module.parameters())
    share = held / sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    warnings.warn(
        f"adapters reach {len(adapted)} layers and none of the routed experts, {share:.0%} of the parameters: "
        'these are packed, not linear layers; load the model with experts_as="linear" for an adapter on each expert, or name '
        'their parameters, target_parameters=["experts.gate_up_proj", "experts.down_proj"]',
        stacklevel=2,
    )
