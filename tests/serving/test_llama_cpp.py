# Licensed under the Apache License, Version 2.0
"""A uniform model in a serving engine that knows nothing of this package: llama.cpp.

Skipped where its Python binding (`pip install xllamacpp gguf`) is not installed.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimum_heapr.pruner import HeaprPruner
from tests.surgery.stock_models import random_plan, wide_model


for package in ("xllamacpp", "gguf"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; pip install xllamacpp gguf", allow_module_level=True)

NEW_TOKENS = 24
SHARED = Path(os.environ.get("HEAPR_SHARED", Path(__file__).resolve().parents[3] / "shared"))
TRAINED = SHARED / "models" / "moe-a"

GENERATE = """
import json, sys
import xllamacpp
path, prompts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = path, 256, 1, False, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
# As in transformers; the default is float16.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
request = {"max_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
texts = [server.handle_completions({"prompt": prompt, **request})["choices"][0]["text"] for prompt in prompts]
print("TEXTS" + json.dumps(texts))
"""


def llama_cpp_tokens(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations of prompts, all token ids. The file gives token 7 the text `<7>`."""
    command = [sys.executable, "-c", GENERATE, str(path), json.dumps(prompts), str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    texts = json.loads(done.stdout.partition("TEXTS")[2])
    return [[int(token) for token in re.findall(r"<(\d+)>", text)] for text in texts]


@torch.no_grad()
def transformers_tokens(model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    """The same, and no end-of-sequence token is generated either way."""
    outputs = []
    for prompt in prompts:
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        ids = torch.tensor([prompt])
        outputs.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    return outputs


def assert_same_tokens(model: torch.nn.Module, prompts: list[list[int]], folder: Path) -> list[list[int]]:
    from .gguf_models import write_gguf

    write_gguf(model, folder / "model.gguf")
    tokens = transformers_tokens(model, prompts)
    assert all(len(continuation) == NEW_TOKENS for continuation in tokens)
    assert llama_cpp_tokens(folder / "model.gguf", prompts) == tokens
    return tokens


def random_prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab_size, (12,), generator=generator).tolist() for _ in range(4)]


@pytest.mark.slow
def test_random_model_generates_the_same_tokens(tmp_path):
    # llama.cpp normalises the router weights of this architecture, as all published checkpoints ask for.
    pruner = HeaprPruner(wide_model("qwen3_moe", norm_topk_prob=True, eos_token_id=0))
    pruner.apply(random_plan(pruner.model, layout="uniform", ratio=0.5))
    pruner.model.generation_config.eos_token_id = 0
    tokens = assert_same_tokens(pruner.model, random_prompts(96), tmp_path)
    assert len({token for continuation in tokens for token in continuation}) > 10  # not one token over and over


@pytest.mark.slow
def test_padded_shared_experts_generate_the_same_tokens(tmp_path):
    """DeepSeekMoE: two shared experts of 32 are stored as three of 24 after pruning a quarter of the routed ones."""
    pruner = HeaprPruner(wide_model("deepseek", eos_token_id=0))
    pruner.apply(random_plan(pruner.model, layout="uniform", ratio=0.25))
    config = pruner.model.config
    assert (config.moe_intermediate_size, config.n_shared_experts) == (24, 3)
    tokens = assert_same_tokens(pruner.model, random_prompts(96), tmp_path)
    assert len({token for continuation in tokens for token in continuation}) > 10


@pytest.mark.slow
@pytest.mark.skipif(not TRAINED.is_dir(), reason=f"no trained model at {TRAINED}; name its parent in HEAPR_SHARED")
@pytest.mark.parametrize("ratio, experts", [(0.25, 32), (0.5, 32), (0.5, 24)])
def test_trained_model_generates_the_same_tokens(ratio, experts, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_heapr import HeaprConfig

    config = HeaprConfig(
        ratio=ratio,
        layout="uniform",
        num_experts=experts,
        dataset=str(SHARED / "data" / "calibration.jsonl"),
        num_samples=8,
        seq_length=128,
    )
    pruner = HeaprPruner.from_pretrained(TRAINED, config=config, dtype="float32")
    pruner.prune()
    pruner.save_pretrained(tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert (model.config.num_experts, model.config.moe_intermediate_size) == (experts, 96 * (1 - ratio) * 32 / experts)
    texts = ("The river rises in the", "def read_file(path):\n", "In 1905 the", "A database index is")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    tokens = assert_same_tokens(model, prompts, tmp_path)
    print([tokenizer.decode(continuation) for continuation in tokens])
