# Licensed under the Apache License, Version 2.0
"""What is served: families whose log-probabilities in vLLM were compared with those in transformers, and where."""

from __future__ import annotations


# Of architectures of pruned models; what follows is the class of the unpruned one, in transformers and in vLLM.
PREFIX = "Heapr"

# By model type. Only what tests/serving/test_vllm.py runs: a family that fits but was not compared is refused.
FAMILIES = {
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
ARCHITECTURES = {PREFIX + name: model_type for model_type, name in FAMILIES.items()}

# Versions of vLLM that the tests were run with, up to the last number.
VLLM_VERSIONS = ("0.32",)

UNIFORM = 'prune it with layout="uniform" instead'


def refusal(model_type: str, vllm_version: str) -> str | None:
    """Why pruned models of a family are not served with widths of their own, in one line; `None` if they are."""
    if vllm_version.rpartition(".")[0] not in VLLM_VERSIONS:
        return (
            f"vLLM {vllm_version} is not one that serves pruned models of variable widths "
            f"({', '.join(version + '.x' for version in VLLM_VERSIONS)} does): install that, or {UNIFORM}"
        )
    if model_type not in FAMILIES:
        served = ", ".join(sorted(FAMILIES))
        return f"{model_type}: vLLM serves variable widths of {served}, and not of this family: {UNIFORM}"
    return None
