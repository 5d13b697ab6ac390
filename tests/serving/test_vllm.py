# Licensed under the Apache License, Version 2.0
"""Pruned models of variable widths in vLLM: log-probabilities are those of transformers.

Skipped where vLLM is not installed; `tests/serving/run_vllm.sh` makes an environment that has it, and runs these.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
from pathlib import Path

import pytest
import torch


if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; tests/serving/run_vllm.sh makes an environment", allow_module_level=True)

# vLLM reads these when it is imported. One process: tests see what a worker raises, and a start costs seconds.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1"
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from optimum_heapr.modeling.auto import register as register_models  # noqa: E402
from optimum_heapr.serving.errors import ServingError  # noqa: E402
from optimum_heapr.serving.families import FAMILIES  # noqa: E402
from tests.serving.variable_models import CONFIGS, VOCAB_SIZE, variable_checkpoint  # noqa: E402


pytestmark = pytest.mark.vllm

NEW_TOKENS = 12
SHARED = Path(os.environ.get("HEAPR_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def served(folder, **options):
    """An engine for a folder; nothing is said about the model but where it is."""
    from vllm import LLM

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4} | options
    return LLM(str(folder), skip_tokenizer_init=True, gpu_memory_utilization=0.2, seed=0, **options)


def prompts() -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (5, 17, 40)]


def log_probabilities(engine) -> list[tuple[list[int], torch.Tensor]]:
    """Prompts with their greedy continuations, and the log-probability of each token but the first."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=0, logprobs=0, ignore_eos=True, detokenize=False
    )
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts()], sampling, use_tqdm=False)
    found = []
    for ids, output in zip(prompts(), outputs):
        new = list(output.outputs[0].token_ids)
        steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        found.append((ids + new, torch.tensor([step[token].logprob for token, step in zip(ids[1:] + new, steps)])))
    return found


@torch.no_grad()
def largest_difference(model: torch.nn.Module, found: list[tuple[list[int], torch.Tensor]]) -> float:
    differences = []
    for ids, actual in found:
        expected = model(input_ids=torch.tensor([ids[:-1]])).logits[0].float().log_softmax(-1)
        differences.append((expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] - actual).abs().max().item())
    return max(differences)


@pytest.fixture(autouse=True)
def one_engine_at_a_time():
    yield
    gc.collect()


@pytest.mark.parametrize("family", [pytest.param(f, id=f) for f in os.environ.get("HEAPR_FAMILIES", ",".join(FAMILIES)).split(",")])
def test_log_probabilities_are_those_of_transformers(family, tmp_path):
    model = variable_checkpoint(tmp_path, family)
    found = log_probabilities(served(tmp_path))
    difference = largest_difference(model, found)
    print(f"\n{family}: {difference:.1e}")
    assert difference < 1e-4
