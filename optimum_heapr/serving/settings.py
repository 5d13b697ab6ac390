# Licensed under the Apache License, Version 2.0
"""What vLLM is asked for that it does not do with variable widths."""

from __future__ import annotations

from .errors import ServingError
from .families import UNIFORM


def check_settings(vllm_config) -> None:
    """Refuses what was not made to work, when the server starts.

    Args:
        vllm_config (`vllm.config.VllmConfig`): of the engine that is about to start.

    Raises:
        [`ServingError`]: for expert or data parallelism, other quantization than W8A8 in INT8, adapters of experts, and devices other than CPUs and CUDA.
    """
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    asked = {
        "expert parallelism (--enable-expert-parallel)": parallel.enable_expert_parallel,
        "data parallelism (--data-parallel-size)": parallel.data_parallel_size > 1,
        "load balancing of experts (--enable-eplb)": parallel.enable_eplb,
        _quantized(vllm_config.model_config.quantization): not _is_served(
            vllm_config.model_config.quantization, _settings(vllm_config.model_config)
        ),
        "adapters of experts (--lora-target-modules experts)": "experts"
        in (getattr(vllm_config.lora_config, "target_modules", None) or ()),
        f"the device {current_platform.device_name}": not (current_platform.is_cpu() or current_platform.is_cuda()),
    }
    refused = [name for name, is_asked in asked.items() if is_asked]
    if refused:
        raise ServingError(f"variable widths are not served with {refused[0]}: leave it out, or {UNIFORM}")


def check_quantization(model_config) -> None:
    """Refuses a checkpoint by how its `config.json` says that it is quantized, before shapes in its files are taken for widths.

    Raises:
        [`ServingError`]: for other quantization than W8A8 in INT8.
    """
    method = _settings(model_config).get("quant_method")
    if not _is_served(method, _settings(model_config)):
        raise ServingError(f"variable widths are not served with {_quantized(method)}: leave it out, or {UNIFORM}")


def _settings(model_config) -> dict:
    return getattr(model_config.hf_config, "quantization_config", None) or {}


def _quantized(method: str | None) -> str:
    return f"quantization other than INT8 with a scale for each row ({method})"


def _is_served(method: str | None, settings: dict) -> bool:
    """Whether a model is not quantized, or as llm-compressor does with `W8A8`: of what was run, experts have a scale for each row."""
    if method is None:
        return True
    weights = [group.get("weights") or {} for group in settings.get("config_groups", {}).values()]
    kinds = {(found.get("type"), found.get("num_bits"), found.get("strategy")) for found in weights}
    return method == "compressed-tensors" and kinds == {("int", 8, "channel")}
