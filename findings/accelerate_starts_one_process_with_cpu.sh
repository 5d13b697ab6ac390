#!/usr/bin/env bash
# accelerate 1.15.0: `accelerate launch --cpu --num_processes 2` starts one process.
#
# Expected: two processes on the CPU, which is what `--num_processes` asks for and `notebook_launcher` does.
# Seen: one, without a warning; a job that shares out its work by rank does all of it, in twice the time.
# Here: the command line says so when a launcher asked for several processes and there is one; the guides start several on a CPU
# by `--multi_gpu` with `ACCELERATE_USE_CPU=true`, or by torchrun.
#
# Output:
#   --cpu --num_processes 2: 1 process
#   --multi_gpu --num_processes 2, ACCELERATE_USE_CPU=true: 2 processes
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
. "$folder/venv/bin/activate"
python -m pip install --quiet torch==2.13.0 accelerate==1.15.0
cd "$folder"
export HF_HOME="$folder/home" OMP_NUM_THREADS=1
cat > count.py <<'EOF'
import os

open(f"rank-{os.environ.get('RANK', 0)}-of-{os.environ.get('WORLD_SIZE', 1)}", "w").close()
EOF
count() {
    rm -f rank-*
    accelerate launch --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "$@" count.py 2> messages || { cat messages; exit 1; }
    ls rank-* | wc -l
}
one=$(count --cpu)
if grep -i "num_processes" messages; then exit 1; fi
two=$(ACCELERATE_USE_CPU=true count --multi_gpu)
echo "--cpu --num_processes 2: $one process"
echo "--multi_gpu --num_processes 2, ACCELERATE_USE_CPU=true: $two processes"
[ "$one" = 1 ] && [ "$two" = 2 ]
