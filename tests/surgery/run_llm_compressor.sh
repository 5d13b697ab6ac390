#!/bin/sh
# Runs what needs llm-compressor, which wants an older transformers, in an environment of its own.
#   tests/surgery/run_llm_compressor.sh FOLDER [arguments of pytest]     the environment is made in FOLDER, once
set -e
folder=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
if [ ! -x "$folder/bin/pytest" ]; then
    python3 -m venv "$folder"
    "$folder/bin/pip" install -q torch==2.13.0 llmcompressor==0.14.0.1 -e "$root[test]"
fi
cd "$root"
exec "$folder/bin/python" -m pytest -p no:cacheprovider -q -n0 "$@" tests/surgery/test_llm_compressor.py tests/docs/test_after_pruning_with_llm_compressor.py
