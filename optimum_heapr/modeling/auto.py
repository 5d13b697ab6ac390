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
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path


_AUTO_CONFIGURATION = "transformers.models.auto.configuration_auto"
_PREFIX = "heapr_"


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
        CONFIG_MAPPING._extra_content = _Configurations(CONFIG_MAPPING._extra_content)


class _Configurations(dict):
    """What `AutoConfig.register` writes to, with this package's model types: their classes are made when looked up.

    Those are `heapr_` before the model type of any family that the installed transformers has, be it newer than this
    package: what is a family is seen by looking, when a name is first asked for.
    """

    def __contains__(self, model_type) -> bool:
        return super().__contains__(model_type) or self._is_ours(model_type)

    def __missing__(self, model_type: str) -> type:
        if not self._is_ours(model_type):
            raise KeyError(model_type)
        self[model_type] = config_class = _configuration_class(model_type)
        return config_class

    def _is_ours(self, model_type) -> bool:
        if not isinstance(model_type, str):
            return False
        if model_type == "deepseek":
            return _is_ported()
        return model_type.startswith(_PREFIX) and is_family(model_type.removeprefix(_PREFIX))


@cache
def is_family(model_type: str) -> bool:
    """Whether models of a type have experts on the experts interface of transformers, as far as their files tell."""
    return "@use_experts_implementation" in modeling_source(model_type)


def modeling_source(model_type: str) -> str:
    """The files in which the models of a type are defined, read and not imported; empty if there are none."""
    from transformers import models
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    if model_type == "deepseek" and _is_ported():
        files = [Path(__file__).with_name("modeling_deepseek.py")]
    elif model_type in CONFIG_MAPPING_NAMES:
        folders = [Path(root, model_type_to_module_name(model_type)) for root in models.__path__]
        files = [file for folder in folders for file in sorted(folder.glob("modeling_*.py"))]
    else:
        files = []
    return "".join(file.read_text(encoding="utf-8") for file in files)


def _is_ported() -> bool:
    """Whether DeepSeekMoE is our port, which a transformers that has it does not need."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return "deepseek" not in CONFIG_MAPPING_NAMES


def _configuration_class(model_type: str) -> type:
    if model_type == "deepseek":
        from .configuration_deepseek import DeepseekConfig

        DeepseekConfig._on_use = _register_deepseek
        return DeepseekConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return pruned_configuration(CONFIG_MAPPING[model_type.removeprefix(_PREFIX)])


def pruned_configuration(base: type) -> type:
    """The configuration class of pruned models whose unpruned ones have configurations of class `base`."""
    if base.model_type == "deepseek" and not base.__module__.startswith("transformers."):
        from .configuration_heapr_deepseek import HeaprDeepseekConfig as config_class
    else:
        from .configuration_heapr import pruned_config_class

        config_class = pruned_config_class(base)
    config_class._on_use = register_model_class
    return config_class


def register_model_class(config_class: type) -> type:
    """Makes and registers the model classes of a pruned configuration class; returns that with the head of language models."""
    if config_class.__name__ == "HeaprDeepseekConfig":
        from .modeling_heapr_deepseek import register_classes

        _register_deepseek(config_class.__mro__[2])
    else:
        from .modeling_heapr import register_classes
    return next(iter(register_classes(config_class).values()))


def _register_deepseek(config_class: type) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    from .configuration_deepseek import DeepseekConfig
    from .modeling_deepseek import DeepseekForCausalLM, DeepseekModel

    AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
