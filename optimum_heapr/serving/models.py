# Licensed under the Apache License, Version 2.0
"""Models of vLLM with experts of variable widths: vLLM's own class of the family, made while `variable_widths` is open."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from vllm.distributed import get_pp_group
from vllm.model_executor.models.registry import ModelRegistry

from .checkpoint import expert_tensor, widths_by_layer
from .errors import ServingError
from .experts import VariableWidths, variable_widths
from .families import ARCHITECTURES, PREFIX


class PrunedModel:
    """Mixed into a model class of vLLM."""

    # Weights only: statistics and plans of older checkpoints lie beside them.
    allow_patterns_overrides = ["model*.safetensors"]
    # vLLM's adapters expect experts as wide as one another.
    supports_lora = False

    def __init__(self, *, vllm_config, prefix: str = ""):
        widths = widths_by_layer(vllm_config.model_config.hf_config.expert_widths)
        with variable_widths(widths, all_layers=get_pp_group().world_size == 1):
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        experts = {m.layer: (path, m) for path, m in self.named_modules() if isinstance(m, VariableWidths)}
        loaded: set[str] = set()

        def others():
            for name, tensor in weights:
                layer, rest = expert_tensor(name) or (None, "")
                if layer is None:
                    yield name, tensor
                elif layer in experts:  # with pipeline parallelism a process has a part of the layers
                    path, module = experts[layer]
                    loaded.update(f"{path}.{parameter}" for parameter in module.load(rest, tensor))

        loaded |= super().load_weights(others())
        for _, module in experts.values():
            if missing := module.missing():
                raise ServingError(f"{module.layer_name}: {missing[0]} is in no file of the checkpoint; copy it again")
        return loaded


@cache
def _model_class(name: str) -> type:
    base = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    return type(name, (PrunedModel, base), {"__module__": __name__, "__qualname__": name})


def __getattr__(name: str) -> type:
    if name in ARCHITECTURES:
        return _model_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
