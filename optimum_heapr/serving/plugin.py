# Licensed under the Apache License, Version 2.0
"""What vLLM calls at the start of each of its processes. Models that are not ours are not touched."""

from __future__ import annotations


def register() -> None:
    """Makes vLLM know pruned models of variable widths. Calling it again changes nothing."""
    import vllm

    from .families import FAMILIES, refusal

    served = [family for family in FAMILIES if refusal(family, vllm.__version__) is None]
    if not served:  # a vLLM that this was not run with: nothing of it is imported or changed
        return _refuse_all(vllm.__version__)
    for family in served:
        _register_architecture(family)
    _read_configurations()


def _refuse_all(vllm_version: str) -> None:
    """Where a configuration of a pruned model is read, in this process, it is said why it is not served."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    from .families import FAMILIES
    from .refused import refused_config_class

    for family in {*CONFIG_MAPPING_NAMES, *FAMILIES}:
        CONFIG_MAPPING.register(f"heapr_{family}", refused_config_class(vllm_version), exist_ok=True)


def _read_configurations() -> None:
    """Puts our reader in the place of vLLM's: its own way to add one (`register_config_parser`) warns of that each time."""
    from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER as readers

    from .configuration import ReadsPrunedModels

    if not issubclass(readers["hf"], ReadsPrunedModels):
        readers["hf"] = type("PrunedConfigParser", (ReadsPrunedModels, readers["hf"]), {})


def _register_architecture(family: str) -> None:
    from vllm.model_executor.models import config as rules
    from vllm.model_executor.models.registry import ModelRegistry

    from . import families

    stock = families.FAMILIES[family]
    name = families.PREFIX + stock
    ModelRegistry.register_model(name, f"{__package__}.models:{name}")
    rules.MODELS_CONFIG_MAP[name] = _checks(rules.MODELS_CONFIG_MAP.get(stock, rules.VerifyAndUpdateConfig))


def _checks(stock: type) -> type:
    """vLLM's own rules for a family, after ours."""

    class Checks(stock):
        @classmethod
        def verify_and_update_model_config(cls, model_config) -> None:
            from .checkpoint import check_folder
            from .quantized import scheme_of

            scheme_of(model_config)  # or the shapes of what is quantized would be taken for widths
            check_folder(model_config.model, model_config.hf_config.expert_widths)
            stock.verify_and_update_model_config(model_config)

        @classmethod
        def verify_and_update_config(cls, vllm_config) -> None:
            from .settings import check_settings

            check_settings(vllm_config)
            stock.verify_and_update_config(vllm_config)

    return Checks
