#!/bin/sh
# Runs what needs exporters for other runtimes, ONNX Runtime and ExecuTorch, in an environment of its own.
#   tests/modeling/run_exporters.sh FOLDER [arguments of pytest]     the environment is made in FOLDER, once
set -e
folder=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
if [ ! -x "$folder/bin/python" ]; then
    python3 -m venv "$folder"
    "$folder/bin/pip" install -q -c "$root/constraints.txt" -e "$root[test]"
    # The version of ExecuTorch is that of torch 2.13.
    "$folder/bin/pip" install -q -c "$root/constraints.txt" onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 executorch==1.4.1
fi
cd "$root"
exec "$folder/bin/python" -m pytest -p no:cacheprovider -q -n0 "$@" tests/modeling/test_exporters.py tests/docs/test_after_pruning_with_exporters.py
