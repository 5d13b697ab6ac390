#!/usr/bin/env bash
# torch 2.13.0: without instructions for bfloat16, a product in it takes many times as long as converting to float32 and multiplying.
#
# Expected: where a CPU has no products of bfloat16, torch converts, so that one takes about as long as in float32; or says something.
# Seen: oneDNN is not asked on x86 CPUs without AVX-512 (`torch.ops.mkldnn._is_mkldnn_bf16_supported()`), and torch's own kernel is used, which is
# slower the more rows there are, and much more so where the second matrix is stored by its own rows, as in the backward of a linear
# layer. Nothing is said. Here ONEDNN_MAX_CPU_ISA=AVX2 makes any x86 CPU such a one.
# Here: expert blocks convert, and calibration names float32 on such CPUs.
#
# Output (one thread of an AMD EPYC with AVX2; times differ, the script asks for 3 and for 8 times as long):
#   oneDNN has products of bfloat16: False
#   a linear layer: 7 times as long as with the conversion to float32
#   by its rows: 62 times as long as with the conversion to float32
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
. "$folder/venv/bin/activate"
python -m pip install --quiet torch==2.13.0 numpy
cd "$folder"
ONEDNN_MAX_CPU_ISA=AVX2 python - <<'EOF'
import time

import torch

torch.set_num_threads(1)


def seconds(function) -> float:
    function()
    times = []
    for _ in range(7):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
print("oneDNN has products of bfloat16:", supported)
assert not supported
rows = torch.randn(64, 512).bfloat16()
weight = torch.randn(1024, 512).bfloat16()
found = []
for name, second in (("a linear layer", weight.T), ("by its rows", weight.T.contiguous())):
    converted = seconds(lambda: (rows.float() @ second.float()).bfloat16())
    found.append(seconds(lambda: rows @ second) / converted)
    print(f"{name}: {found[-1]:.0f} times as long as with the conversion to float32")
assert found[0] > 3 and found[1] > 8
EOF
