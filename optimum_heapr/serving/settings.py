# Licensed under the Apache License, Version 2.0
"""What vLLM is asked for that it does not do with variable widths."""

from __future__ import annotations

from .errors import ServingError
from .families import UNIFORM
from .quantized import scheme_of


def check_settings(vllm_config) -> None:
    """Refuses what was not made to work, when the server starts.

    Args:
        vllm_config (`vllm.config.VllmConfig`): of the engine that is about to start.

    Raises:
        [`ServingError`]: for expert or data parallelism, quantization that is not served, adapters of experts, and devices other than CPUs and CUDA.
    """
    from vllm.platforms import current_platform

    scheme_of(vllm_config.model_config)
    parallel = vllm_config.parallel_config
    asked = {
        "expert parallelism (--enable-expert-parallel)": parallel.enable_expert_parallel,
        "data parallelism (--data-parallel-size)": parallel.data_parallel_size > 1,
        "load balancing of experts (--enable-eplb)": parallel.enable_eplb,
        "adapters of experts (--lora-target-modules experts)": "experts"
        in (getattr(vllm_config.lora_config, "target_modules", None) or ()),
        f"the device {current_platform.device_name}": not (current_platform.is_cpu() or current_platform.is_cuda()),
    }
    refused = [name for name, is_asked in asked.items() if is_asked]
    if refused:
        raise ServingError(f"variable widths are not served with {refused[0]}: leave it out, or {UNIFORM}")
