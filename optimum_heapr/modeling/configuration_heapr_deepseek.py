# Licensed under the Apache License, Version 2.0
"""Configuration of pruned DeepSeekMoE models. This file travels with pruned checkpoints."""

from .configuration_deepseek import DeepseekConfig
from .configuration_heapr import pruned_config_class


HeaprDeepseekConfig = pruned_config_class(DeepseekConfig, __name__)
