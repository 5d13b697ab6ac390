# Licensed under the Apache License, Version 2.0
"""Models of vLLM with experts of variable widths: vLLM's own class of the family, made while `variable_widths` is open."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.registry import ModelRegistry

from .checkpoint import expert_tensor, widths_by_layer
from .errors import ServingError
from .experts import VariableWidths, variable_widths
from .families import ARCHITECTURES, PREFIX
from .quantized import scheme_of


class PrunedModel:
    """Mixed into a model class of vLLM."""

    # Weights only: statistics and plans of older checkpoints lie beside them.
    allow_patterns_overrides = ["model*.safetensors"]

    def __init__(self, *, vllm_config, prefix: str = ""):
        widths = widths_by_layer(vllm_config.model_config.hf_config.expert_widths)
        scheme = scheme_of(vllm_config.model_config)
        with variable_widths(widths, scheme, all_layers=get_pp_group().world_size == 1):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        lora = vllm_config.lora_config
        if lora is not None and lora.target_modules is None:
            # vLLM's adapters of experts expect all of one width: only linear layers get any.
            lora.target_modules = sorted({_last(n) for n, m in self.named_modules() if isinstance(m, LinearBase)})

    @property
    def lora_manager(self):
        return self.__dict__.get("_lora_manager")

    @lora_manager.setter
    def lora_manager(self, manager) -> None:
        """vLLM hands over here what loads adapters: one that adapts experts is refused then, and not passed over."""
        experts = {_last(name) for name, module in self.named_modules() if isinstance(module, MoERunner)}
        manager.supported_lora_modules = [n for n in manager.supported_lora_modules if n not in experts]
        self.__dict__["_lora_manager"] = manager

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        if self.__dict__.setdefault("_has_weights", False):
            # On CPUs vLLM 0.32 computes something else after that, with stock models as well; on GPUs it was not run.
            raise ServingError("weights of variable widths are not loaded a second time: start another engine")
        self._has_weights = True
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


def _last(name: str) -> str:
    return name.rpartition(".")[2]


@cache
def _model_class(name: str) -> type:
    base = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    return type(name, (PrunedModel, base), {"__module__": __name__, "__qualname__": name})


def __getattr__(name: str) -> type:
    if name in ARCHITECTURES:
        return _model_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
