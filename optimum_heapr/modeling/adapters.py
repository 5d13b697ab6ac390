# Licensed under the Apache License, Version 2.0
"""Says what an adapter does not do for each expert. This file travels with pruned checkpoints."""

import warnings
from collections.abc import Iterable

from torch import nn

from .atomic_experts import AtomicExperts
from .linear_experts import LinearExperts


ONE_EACH = 'load the model with experts_as="linear" for an adapter on each expert'


def warn_of_experts(model: nn.Module, adapters: dict) -> None:
    """Warns if adapters that are to be trained reach layers of a model, but none of its packed experts, or all of a layer as one.

    PEFT's `target_modules` finds layers, of which packed experts have none: a list that names them, or `all-linear`, then adapts
    attention alone. Its `target_parameters` takes each packed parameter for one matrix. PEFT says neither.

    Args:
        model (`nn.Module`): after PEFT has put its layers in.
        adapters (`dict[str, PeftConfig]`): what PEFT was asked for, by name.
    """
    experts = {path: module for path, module in model.named_modules() if isinstance(module, AtomicExperts)}
    # What all layers of PEFT have; PEFT itself need not be there where a checkpoint goes.
    adapted = {path: module for path, module in model.named_modules() if hasattr(type(module), "adapter_layer_names")}
    if not experts or not adapted or all(config.inference_mode for config in adapters.values()):
        return
    # PEFT wraps a module whose parameters it adapts; what is trained whole it wraps as well, or leaves open.
    around = [adapted[own] for path in experts for own in adapted if path == own or path.startswith(f"{own}.")]
    if any(hasattr(wrapper, "parameter_name") for wrapper in around):
        most = max(module.num_experts for module in experts.values())
        warnings.warn(
            f"adapters of packed experts: one update of low rank for all experts of a layer together, up to {most}; {ONE_EACH}",
            stacklevel=2,
        )
    if around or any(parameter.requires_grad for module in experts.values() for parameter in module.parameters()):
        return
    held = sum(parameter.numel() for module in experts.values() for parameter in module.parameters())
    share = held / sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    warnings.warn(
        f"adapters reach {len(adapted)} layers and none of the routed experts, {share:.0%} of the parameters: "
        f"these are packed, not linear layers; {ONE_EACH}, or name "
        'their parameters for one on all of a layer, target_parameters=["experts.gate_up_proj", "experts.down_proj"]',
        stacklevel=2,
    )


def adapters_of_another_form(model: nn.Module, names: Iterable[str]) -> list[str]:
    """What to say, in no line or one, if tensors of an adapter belong to experts in the form that those of a model do not have.

    PEFT leaves out such tensors and says nothing: of the adapter attention alone would be loaded.

    Args:
        model (`nn.Module`): after PEFT has put its layers in.
        names (`Iterable[str]`): of the tensors, as parameters of the model.
    """
    own = {name for name, _ in model.named_parameters()}
    unknown = [name for name in names if name not in own]
    for path, module in model.named_modules():
        if isinstance(module, (AtomicExperts, LinearExperts)):
            block = path.partition(".base_layer")[0]
            if any(name.startswith(f"{block}.") for name in unknown):
                theirs, ours = ("linear", "packed") if isinstance(module, AtomicExperts) else ("packed", "linear")
                return [
                    f'the adapter was trained on experts in the form "{theirs}", and those of this model are "{ours}": load the '
                    f'model with experts_as="{theirs}"'
                ]
    return []
