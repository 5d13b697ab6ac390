#!/usr/bin/env bash
# bitsandbytes 0.50.2: a layer in 4 bits of any size computes on a CPU, unless that knows products of bfloat16.
#
# Expected: a model that was quantized computes on each device that bitsandbytes knows.
# Seen: on CPUs with AVX512-BF16 the first forward of a layer packs its weights for a kernel of 32 rows and whole blocks of 64 columns, and
# stops at others. The same layer computes on a CPU without it, and here once `support_avx512bf16_for_cpu` is off.
# Here: experts of variable widths are such layers; `width_multiple=64` keeps them so, and the guide names the attribute.
#
# Output (with AVX512-BF16; other CPUs say that there is nothing to see):
#   64 rows of 64: computes
#   48 rows of 64: N must be divisible by block_n
#   64 rows of 96: shape '[64, 1]' is invalid for input of size 96
#   48 rows of 96, the attribute off: computes
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
. "$folder/venv/bin/activate"
python -m pip install --quiet torch==2.13.0 bitsandbytes==0.50.2
cd "$folder"
TORCHDYNAMO_DISABLE=1 python - <<'EOF'
import torch
from bitsandbytes.nn import Linear4bit


def said(rows: int, columns: int, packs: bool = True) -> str:
    layer = Linear4bit(columns, rows, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16).to("cpu").eval()
    layer.support_avx512bf16_for_cpu = packs and layer.support_avx512bf16_for_cpu
    try:
        with torch.no_grad():
            assert layer(torch.ones(3, columns, dtype=torch.bfloat16)).shape == (3, rows)
    except (AssertionError, RuntimeError) as error:
        return str(error)
    return "computes"


if not Linear4bit(64, 64).support_avx512bf16_for_cpu:
    print("this CPU has no products of bfloat16: nothing to see")
else:
    found = said(64, 64), said(48, 64), said(64, 96), said(48, 96, packs=False)
    print("64 rows of 64: {}\n48 rows of 64: {}\n64 rows of 96: {}\n48 rows of 96, the attribute off: {}".format(*found))
    assert found[0] == found[3] == "computes" and "block_n" in found[1] and "is invalid" in found[2]
EOF
