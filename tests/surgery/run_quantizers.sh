#!/bin/sh
# Runs what needs quantizers, in an environment of its own.
#   tests/surgery/run_quantizers.sh FOLDER [arguments of pytest]     the environment is made in FOLDER, once
set -e
folder=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
if [ ! -x "$folder/bin/python" ]; then
    python3 -m venv "$folder"
    "$folder/bin/pip" install -q -c "$root/constraints.txt" -e "$root[test]"
    "$folder/bin/pip" install -q -c "$root/constraints.txt" bitsandbytes==0.50.2 torchao==0.18.0 compressed-tensors==0.19.0
fi
cd "$root"
# Kernels for the CPU are compiled anew for each width, which says nothing here.
export TORCHDYNAMO_DISABLE=1
exec "$folder/bin/python" -m pytest -p no:cacheprovider -q -n0 "$@" tests/surgery/test_quantizers.py tests/checkpoints/test_compressed_tensors.py tests/docs/test_after_pruning_with_quantizers.py
