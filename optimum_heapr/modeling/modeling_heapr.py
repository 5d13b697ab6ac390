# Licensed under the Apache License, Version 2.0
"""Pruned models, made from the model class of the unpruned family.

`HeaprQwen3MoeForCausalLM` is `transformers.Qwen3MoeForCausalLM` with its experts replaced by `AtomicExperts`; any other
family works the same way, so the classes are made when they are first asked for.
This file travels with pruned checkpoints.
"""

from functools import cache

import torch
import transformers
from torch import nn
from transformers import initialization
from transformers.models.auto import modeling_auto

from .atomic_experts import AtomicExperts
from .configuration_heapr import PREFIX, pruned_config_class
from .conversion import register_conversions


# Tried in this order for the auto class that a family belongs to.
AUTO_CLASSES = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
}


class PrunedModelMixin:
    """Puts `AtomicExperts` of the widths in the configuration where the stock experts were."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for path, widths in (config.expert_widths or {}).items():
            stock = self.get_submodule(path)
            register_conversions(config.model_type, not stock.is_concatenated, stock.has_bias)
            experts = AtomicExperts(stock, widths)
            self.set_submodule(path, experts)
            if experts.down_proj.device.type != "meta":
                self._init_weights(experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, AtomicExperts):
            for parameter in module.parameters(recurse=False):
                initialization.normal_(parameter, 0.0, getattr(self.config, "initializer_range", 0.02))
        else:
            super()._init_weights(module)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


def pruned_model_class(
    base: type, config_class: type | None = None, module: str = __name__, auto_class: str | None = None
) -> type:
    """The class of pruned models of a family.

    Args:
        base (`type`): model class of the unpruned model, with a head.
        config_class (`type`, *optional*): pruned configuration class; made from the base's by default.
        module (`str`): module that the class can be imported from, by the name `Heapr` + name of the base.
        auto_class (`str`, *optional*): what its checkpoints are loaded with; found from the base by default.
    """
    return _pruned_model_class(
        base,
        config_class or pruned_config_class(base.config_class),
        module,
        auto_class or auto_class_name(base.config_class),
    )


@cache  # whoever asks gets the same class, or pickle would refuse its instances
def _pruned_model_class(base: type, pruned_config: type, module: str, auto_class: str) -> type:
    class PrunedModel(PrunedModelMixin, base):
        config_class = pruned_config

    PrunedModel.__name__ = PrunedModel.__qualname__ = PREFIX + base.__name__
    PrunedModel.__module__ = module
    PrunedModel.register_for_auto_class(auto_class)
    return PrunedModel


def auto_class_name(base_config: type) -> str:
    """Name of the auto class that a family's models are loaded with."""
    for name, mapping in AUTO_CLASSES.items():
        if base_config in mapping:
            return name
    raise ValueError(f"{base_config.__name__}: belongs to none of {', '.join(AUTO_CLASSES)}")


def __getattr__(name: str) -> type:
    if name.startswith(PREFIX) and hasattr(transformers, name.removeprefix(PREFIX)):
        return pruned_model_class(getattr(transformers, name.removeprefix(PREFIX)))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
