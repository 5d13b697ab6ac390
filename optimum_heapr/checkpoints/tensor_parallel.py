# Licensed under the Apache License, Version 2.0
"""How transformers is told to split a model over the processes of a run by tensor parallelism."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from ..calibration.processes import start_processes
from ..calibration.sharing import slice_of
from ..experts import find_expert_blocks
from ..utils.errors import HeaprError, did_you_mean
from ..utils.placement import without_storage


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


TP_PLANS = ("auto", "experts")
"""What is split over processes: all that the plan of transformers splits, or of that the experts alone."""

SHARDING_OPTIONS = ("tp_plan", "distributed_config")
"""Options of `from_pretrained` that spread a model over processes."""


def is_spread(model_options: dict[str, Any]) -> bool:
    """Whether options of `from_pretrained` spread a model over processes."""
    return any(model_options.get(name) is not None for name in SHARDING_OPTIONS)


def check_spreading(memory: str, model_options: dict[str, Any]) -> None:
    """Refuses what does not go together, before anything is loaded.

    Raises:
        HeaprError: if the processes or the plan are missing, or the weights are to be elsewhere as well.
    """
    if not is_spread(model_options):
        return
    plan = model_options.get("tp_plan")
    if plan is not None and plan not in TP_PLANS:
        raise HeaprError(f"tp_plan={plan!r}: must be {' or '.join(TP_PLANS)}{did_you_mean(str(plan), TP_PLANS)}")
    name = f"tp_plan={plan!r}" if plan is not None else "distributed_config"
    for option, value in (("memory", None if memory in ("auto", "plain") else memory), *model_options.items()):
        if option in ("memory", "device_map", "dequantize") and value:
            raise HeaprError(
                f"{option}={value!r}: with {name} each process has some of the weights on its device; leave out one of them"
            )
    if _processes() == 1:
        raise HeaprError(
            f"{name}: there is one process to split the model over; start several, with torchrun or accelerate, and where there are no "
            "GPUs, for which accelerate starts one, with torchrun and the variable ACCELERATE_USE_CPU=true"
        )


def spreading_options(
    auto_class: type, config: PreTrainedConfig, model: str, tp_plan: str, **trust: bool
) -> dict[str, Any]:
    """What `from_pretrained` takes to split a model over the processes of this run by its own plan for tensor parallelism.

    Args:
        auto_class (`type`): auto class of the model.
        config (`PreTrainedConfig`): its configuration.
        model (`str`): what the user called it.
        tp_plan (`str`): one of `TP_PLANS`.
        trust (`bool`): `trust_remote_code`, if it was passed.

    Raises:
        HeaprError: if it has no experts, or transformers no plan for them, or its experts or its attention cannot be split over so
            many processes.
    """
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    connected = start_processes().num_processes  # so that each waits as long for the others as in the rest of the run
    if connected != _processes():
        raise HeaprError(
            f"tp_plan={tp_plan!r}: accelerate connects {connected} of {_processes()} processes; on CPUs set "
            "ACCELERATE_USE_CPU=true"
        )
    skeleton = without_storage(lambda: auto_class.from_config(config, **trust))
    blocks = find_expert_blocks(skeleton)
    for block in blocks:
        slice_of(block, _processes())
    paths = {re.sub(r"\.\d+(?=\.)", ".*", block.path) for block in blocks}
    experts = re.compile("|".join(re.escape(path) + r"(\..*)?" for path in paths))
    plan = dict(skeleton.tp_plan or {})
    of_experts = {rule: style for rule, style in plan.items() if experts.fullmatch(rule)}
    if not of_experts:
        raise HeaprError(
            f"tp_plan={tp_plan!r}: transformers has no plan that splits the experts of model={model!r} "
            f"({config.model_type}); leave it out, and use memory='auto' or device_map='auto' in one process"
        )
    if tp_plan == "experts":
        # What is not overridden is split, where transformers has a style that says it shall not.
        left = {rule: "replicate" for rule in plan if rule not in of_experts and "replicate" in ALL_PARALLEL_STYLES}
        return {"distributed_config": DistributedConfig(tp_plan={**left, **of_experts})}
    text = config.get_text_config()
    if any(style == "colwise" for rule, style in plan.items() if "attn" in rule):
        for name in ("num_attention_heads", "num_key_value_heads"):
            number = getattr(text, name, None) or 0
            if number % _processes():
                raise HeaprError(
                    f"tp_plan='auto': {name}={number} of model={model!r} cannot be shared by {_processes()} processes; pass "
                    "tp_plan='experts', which leaves all but the experts whole, or start another number of processes"
                )
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
