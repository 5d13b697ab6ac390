# Licensed under the Apache License, Version 2.0
"""Configurations of pruned models in a process of a vLLM that cannot serve them: none is read without saying so."""

from functools import cache

from transformers import PreTrainedConfig

from .errors import ServingError
from .families import refusal


@cache
def refused_config_class(vllm_version: str) -> type:
    """A class of configurations that says, when one is read, why models of its family are not served."""

    class RefusedConfig(PreTrainedConfig):
        @classmethod
        def from_dict(cls, config_dict, **kwargs):
            raise ServingError(refusal(config_dict["model_type"].removeprefix("heapr_"), vllm_version))

    return RefusedConfig
