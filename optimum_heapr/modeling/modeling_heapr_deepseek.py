# Licensed under the Apache License, Version 2.0
"""Pruned DeepSeekMoE models. This file travels with pruned checkpoints."""

from .configuration_heapr_deepseek import HeaprDeepseekConfig
from .modeling_deepseek import DeepseekForCausalLM
from .modeling_heapr import pruned_model_class


HeaprDeepseekForCausalLM = pruned_model_class(
    DeepseekForCausalLM, HeaprDeepseekConfig, __name__, "AutoModelForCausalLM"
)
