#!/usr/bin/env bash
# torch 2.13.0: the product of int8 matrices that int8 layers of bitsandbytes 0.50.2 compute with on a CPU.
#
# Expected: `torch._int_mm(a, b.t())` is the product, exactly, for all shapes.
# Seen: where `a` and `b` have one column, numbers are wrong on a CPU with AVX512 (VNNI), without a message. 2 to 96 columns are right.
# Here: down projections of experts of width 1 are such, and a model in int8 has another perplexity (63 became 112); the guide says to
# keep widths of 2 at least (`min_width=2`) or multiples.
#
# Output (other CPUs may say that there is nothing to see):
#   columns with wrong products: [1]
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
. "$folder/venv/bin/activate"
python -m pip install --quiet torch==2.13.0 numpy
cd "$folder"
python - <<'EOF'
import torch

torch.manual_seed(0)
wrong = []
for columns in (1, 2, 3, 5, 8, 31, 48, 64, 96):
    a, b = (torch.randint(-127, 128, (rows, columns), dtype=torch.int8) for rows in (16, 192))
    if not torch.equal(torch._int_mm(a, b.t()).long(), a.long() @ b.t().long()):
        wrong.append(columns)
if wrong:
    print("columns with wrong products:", wrong)
    assert wrong == [1], "this has changed"
else:
    print("this CPU computes them right, or torch does now: nothing to see")
EOF
