# Licensed under the Apache License, Version 2.0
"""Configurations of pruned models as vLLM is to see them: those of the unpruned family, with the widths.

vLLM has rules for model types ("deepseek_v2" has latent attention), so a pruned model's type must be the family's there.
"""

from __future__ import annotations

from functools import cache

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..modeling.configuration_heapr import pruned_config_class
from .errors import ServingError
from .families import refusal


PREFIX = "Served_"


@cache
def served_config_class(model_type: str) -> type:
    """The class of configurations of pruned models of a family, in vLLM's processes."""
    pruned = pruned_config_class(CONFIG_MAPPING[model_type])

    class ServedConfig(pruned):
        _on_use = None

        def __post_init__(self, **kwargs):
            super().__post_init__(**kwargs)
            self.model_type = model_type

    ServedConfig.__name__ = ServedConfig.__qualname__ = PREFIX + model_type  # processes are sent configurations
    return ServedConfig


def refused_config_class(vllm_version: str) -> type:
    """A class of configurations that says, when one is read, why models of its family are not served."""

    class RefusedConfig(PreTrainedConfig):
        @classmethod
        def from_dict(cls, config_dict, **kwargs):
            raise ServingError(refusal(config_dict["model_type"].removeprefix("heapr_"), vllm_version))

    return RefusedConfig


def __getattr__(name: str) -> type:
    if name.startswith(PREFIX):
        return served_config_class(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
