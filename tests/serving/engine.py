# Licensed under the Apache License, Version 2.0
"""An engine of vLLM in this process, and what it says of a few prompts; for tests that vLLM's environment runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch

from tests.serving.variable_models import VOCAB_SIZE


# vLLM reads these when it is imported. One process: tests see what a worker raises, and a start costs seconds.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    HF_HUB_OFFLINE="1",
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

NEW_TOKENS = 12

ROOT = Path(__file__).parents[2]
RANKS = """
import json, sys
from tests.serving.engine import log_probabilities, served

if __name__ == "__main__":  # processes of vLLM import this file
    found = []
    for folder in sys.argv[2:]:
        engine = served(folder, **json.loads(sys.argv[1]))
        found.append([(ids, values.tolist()) for ids, values in log_probabilities(engine)])
        del engine
    for values in found:
        print(json.dumps(values))
"""


def served(folder, **options):
    """An engine for a folder; nothing is said about the model but where it is."""
    from vllm import LLM

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4} | options
    return LLM(str(folder), skip_tokenizer_init=True, gpu_memory_utilization=0.2, seed=0, **options)


def prompts() -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (5, 17, 40)]


def log_probabilities(engine, **options) -> list[tuple[list[int], torch.Tensor]]:
    """Prompts with their greedy continuations, and the log-probability of each token but the first."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=0, logprobs=0, ignore_eos=True, detokenize=False
    )
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts()], sampling, use_tqdm=False, **options)
    found = []
    for ids, output in zip(prompts(), outputs):
        new = list(output.outputs[0].token_ids)
        steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        found.append((ids + new, torch.tensor([step[token].logprob for token, step in zip(ids[1:] + new, steps)])))
    return found


def in_ranks(folders: list[Path], scratch: Path, **options) -> list[list[tuple[list[int], torch.Tensor]]]:
    """What `log_probabilities` gives for each folder, of engines whose ranks are processes of their own."""
    script = scratch / "ranks.py"
    script.write_text(RANKS)
    environment = {**os.environ, "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    # Behind what is there already, such as a folder of kernels.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(script), json.dumps(options), *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()[-len(folders) :]
    return [[(ids, torch.tensor(values)) for ids, values in json.loads(line)] for line in lines]


@torch.no_grad()
def largest_difference(model: torch.nn.Module, found: list[tuple[list[int], torch.Tensor]]) -> float:
    differences = []
    for ids, actual in found:
        expected = model(input_ids=torch.tensor([ids[:-1]])).logits[0].float().log_softmax(-1)
        differences.append((expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] - actual).abs().max().item())
    return max(differences)
