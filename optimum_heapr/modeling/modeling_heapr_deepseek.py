# Licensed under the Apache License, Version 2.0
"""Pruned DeepSeekMoE models. This file travels with pruned checkpoints."""

from transformers import AutoModel, AutoModelForCausalLM

from .configuration_deepseek import DeepseekConfig
from .configuration_heapr_deepseek import HeaprDeepseekConfig
from .modeling_deepseek import DeepseekForCausalLM, DeepseekModel
from .modeling_heapr import pruned_model_class


# Where a checkpoint brought this file along, nobody else has said so.
AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)

HeaprDeepseekForCausalLM = pruned_model_class(
    DeepseekForCausalLM, HeaprDeepseekConfig, __name__, "AutoModelForCausalLM"
)
HeaprDeepseekModel = pruned_model_class(DeepseekModel, HeaprDeepseekConfig, __name__, "AutoModel")


def register_classes(pruned_config: type) -> dict[str, type]:
    """As that of `modeling_heapr`, of the classes here."""
    AutoModel.register(pruned_config, HeaprDeepseekModel, exist_ok=True)
    AutoModelForCausalLM.register(pruned_config, HeaprDeepseekForCausalLM, exist_ok=True)
    return {"AutoModelForCausalLM": HeaprDeepseekForCausalLM, "AutoModel": HeaprDeepseekModel}
