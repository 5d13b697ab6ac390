# Licensed under the Apache License, Version 2.0
"""Configurations of pruned models, made from the configuration class of the unpruned one.

`HeaprQwen3MoeConfig` is `transformers.Qwen3MoeConfig` with the model type `heapr_qwen3_moe` and three more fields; any other
family works the same way, so the classes are made when they are first asked for.
This file travels with pruned checkpoints.
"""

from functools import cache

import transformers


if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"this model's experts have widths of their own, which needs transformers 5 or newer; here is {transformers.__version__}. "
        "Update it (pip install -U transformers), or prune again with layout 'uniform', which older ones load."
    )

PREFIX = "Heapr"


class PrunedConfigMixin:
    """What a pruned model's configuration has beyond that of the unpruned one.

    Attributes:
        expert_widths (`dict[str, list[int]]`): by module path of the expert block, atomic experts of each expert.
        experts_as (`str`): `packed`, one tensor for all experts of a layer and projection, or `linear`, a linear layer for each
            expert and projection, which quantizers and adapters see. Checkpoints are the same.
        heapr_config (`dict`): the `HeaprConfig` that made the model.
    """

    # Called once an instance exists; the package sets it to register the model class no earlier than that.
    _on_use = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self._on_use is not None:
            type(self)._on_use(type(self))


@cache
def pruned_config_class(base: type, module: str = __name__) -> type:
    """The configuration class of pruned models of a family.

    Args:
        base (`type`): configuration class of the unpruned model.
        module (`str`): module that the class can be imported from, by the name `Heapr` + name of the base.
    """

    class PrunedConfig(PrunedConfigMixin, base):
        model_type = f"heapr_{base.model_type}"
        # The experts of a pruned model have widths of their own: plans that cut them by a stock shape no longer fit.
        base_model_tp_plan = {
            name: style for name, style in (base.base_model_tp_plan or {}).items() if ".experts" not in name
        }
        base_model_ep_plan = None

        expert_widths: dict | None = None
        experts_as: str = "packed"
        heapr_config: dict | None = None

    PrunedConfig.__name__ = PrunedConfig.__qualname__ = PREFIX + base.__name__
    PrunedConfig.__module__ = module
    PrunedConfig.register_for_auto_class("AutoConfig")
    return PrunedConfig


def __getattr__(name: str) -> type:
    if name.startswith(PREFIX) and name.endswith("Config"):
        return pruned_config_class(getattr(transformers, name.removeprefix(PREFIX)))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
