# Licensed under the Apache License, Version 2.0
"""Makes the auto classes of transformers know pruned models, without importing any of them.

`import optimum_heapr` must stay light, and transformers' auto classes alone cost more than everything else here. So
registration happens in three steps, each when it is first needed:

1. the names of the model types, when `transformers.models.auto.configuration_auto` is imported, by whomever;
2. the configuration class of a family, when it is looked up by its name: at the time of step 1 the configuration that
   it is made from may be half imported itself, as in `from transformers import Qwen3MoeConfig`;
3. the model class of a family, when a configuration of that family exists.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec


_AUTO_CONFIGURATION = "transformers.models.auto.configuration_auto"

# Model types of transformers whose checkpoints can be pruned; `optimum-cli heapr families` shows where they come from,
# and a test holds this list against transformers' own modeling files. Pruned checkpoints of a family that is not listed
# still load with `trust_remote_code=True`.
FAMILIES = (
    "afmoe",
    "aria",
    "aria_text",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "cohere2_moe",
    "deepseek_ocr2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "diffusion_gemma",
    "dots1",
    "dots3_note",
    "dots3_note_text",
    "ernie4_5_moe",
    "ernie4_5_vl_moe",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "gemma4",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe",
    "glm5_next",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "inkling2",
    "inkling2_text",
    "inkling_mm_model",
    "inkling_text",
    "jamba",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lfm2_moe",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl",
    "minimax_m3_vl_text",
    "mistral4",
    "mistral_large4",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe_thinker",
    "qwen3_vl_moe",
    "qwen4_exp",
    "qwen4_exp_text",
    "solar_open",
    "unlimited_ocr",
    "zaya",
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
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(CONFIG_MAPPING._extra_content, _Configurations):
        CONFIG_MAPPING._extra_content = _Configurations(CONFIG_MAPPING._extra_content, stock=CONFIG_MAPPING._mapping)


class _Configurations(dict):
    """What `AutoConfig.register` writes to, with this package's model types: their classes are made when looked up."""

    def __init__(self, registered: dict[str, type], stock: dict[str, str]):
        super().__init__(registered)
        # An older transformers may lack some families; one that has DeepSeekMoE itself gets no port of it.
        self.ours = {f"heapr_{model_type}" for model_type in FAMILIES if model_type in stock}
        if "deepseek" not in stock:
            self.ours |= {"deepseek", "heapr_deepseek"}

    def __contains__(self, model_type) -> bool:
        return super().__contains__(model_type) or model_type in self.ours

    def __missing__(self, model_type: str) -> type:
        if model_type not in self.ours:
            raise KeyError(model_type)
        self[model_type] = config_class = _configuration_class(model_type)
        return config_class


def _configuration_class(model_type: str) -> type:
    if model_type == "deepseek":
        from .configuration_deepseek import DeepseekConfig as config_class

        config_class._on_use = _register_deepseek
        return config_class
    if model_type == "heapr_deepseek":
        from .configuration_heapr_deepseek import HeaprDeepseekConfig as config_class
    else:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        from .configuration_heapr import pruned_config_class

        config_class = pruned_config_class(CONFIG_MAPPING[model_type.removeprefix("heapr_")])
    config_class._on_use = register_model_class
    return config_class


def pruned_configuration_class(base: type) -> type:
    """The pruned class of a configuration class, from the module that a checkpoint takes along for it."""
    from .configuration_deepseek import DeepseekConfig
    from .configuration_heapr import pruned_config_class

    if base is DeepseekConfig:  # transformers cannot make it where this package is not
        from .configuration_heapr_deepseek import HeaprDeepseekConfig

        return HeaprDeepseekConfig
    return pruned_config_class(base)


def register_model_class(config_class: type) -> type:
    """Makes and registers the model class of a pruned configuration class; returns it."""
    import transformers

    from .modeling_heapr import AUTO_CLASSES, auto_class_name, pruned_model_class

    base_config = next(base for base in config_class.__mro__[1:] if hasattr(base, "model_type"))
    if base_config.model_type == "deepseek":
        from .modeling_heapr_deepseek import HeaprDeepseekForCausalLM as model_class

        name = "AutoModelForCausalLM"
        _register_deepseek(base_config)
    else:
        name = auto_class_name(base_config)
        model_class = pruned_model_class(AUTO_CLASSES[name][base_config], config_class)
    getattr(transformers, name).register(config_class, model_class, exist_ok=True)
    return model_class


def _register_deepseek(config_class: type) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    from .configuration_deepseek import DeepseekConfig
    from .modeling_deepseek import DeepseekForCausalLM, DeepseekModel

    AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
