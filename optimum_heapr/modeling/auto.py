# Licensed under the Apache License, Version 2.0
"""Makes the auto classes of transformers know pruned models, without importing any of them.

`import optimum_heapr` must stay light, and transformers' auto classes alone cost more than everything else here. So
registration happens in two steps, each when it is first needed:

1. configurations, when `transformers.models.auto.configuration_auto` is imported, by whomever;
2. the model class of a family, when a configuration of that family exists.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec


_AUTO_CONFIGURATION = "transformers.models.auto.configuration_auto"

# Model types of transformers whose checkpoints can be pruned, `optimum-cli heapr families`. Only families listed here
# can be loaded by name in a fresh process; a test holds the list against transformers' own modeling files.
FAMILIES = (
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_moe",
)


def register() -> None:
    """Registers all families, now or as soon as transformers' auto classes are imported."""
    if _AUTO_CONFIGURATION in sys.modules:
        _register_configurations()
    elif not any(isinstance(finder, _AfterAutoConfiguration) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterAutoConfiguration())


class _AfterAutoConfiguration(importlib.abc.MetaPathFinder):
    """Lets transformers' auto classes be imported as always, and registers the configurations just after."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != _AUTO_CONFIGURATION:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_then_register(module):
            execute(module)
            _register_configurations()

        spec.loader.exec_module = execute_then_register
        return spec


def _register_configurations() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    from .configuration_heapr import pruned_config_class

    for model_type in FAMILIES:
        if model_type in CONFIG_MAPPING:  # an older transformers may lack some
            pruned = pruned_config_class(CONFIG_MAPPING[model_type])
            pruned._on_use = register_model_class
            AutoConfig.register(pruned.model_type, pruned, exist_ok=True)


def register_model_class(config_class: type) -> type:
    """Makes and registers the model class of a pruned configuration class; returns it."""
    import transformers

    from .modeling_heapr import AUTO_CLASSES, auto_class_name, pruned_model_class

    base_config = next(base for base in config_class.__mro__[1:] if hasattr(base, "model_type"))
    name = auto_class_name(base_config)
    model_class = pruned_model_class(AUTO_CLASSES[name][base_config], config_class)
    getattr(transformers, name).register(config_class, model_class, exist_ok=True)
    return model_class
