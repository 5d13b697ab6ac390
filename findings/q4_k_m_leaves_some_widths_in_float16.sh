#!/usr/bin/env bash
# llama.cpp 0.5.0 (the library in npm's @node-llama-cpp/linux-x64 3.22.1) with gguf 0.19.0: a "Q4_K_M" of a Mixture-of-Experts model whose experts are not a
# multiple of 32 wide keeps a third of their weights in float16. 0.7.0 (Debian's llama-quantize) does so too.
#
# Expected: a file in four bits, or an error that names the width.
# Seen: K-quants want rows of 256. Rows of other multiples of 32 fall back to types of 5 and 8 bits, all others to float16, and the rows of down
# projections are as long as an expert is wide. Each has a warning in the log, the file says Q4_K_M, and the return value is that of success.
# Experts of 200 are larger than those of 256.
# Here: the guide to serving says which widths are what, `--align-for gguf` keeps to multiples of 256, and plans say how many widths are
# multiples of 32.
#
# Output:
#   width 256: Q4_K_M, down projections in Q6_K, experts of 5.19 bits a weight, 0.51 MB
#   width 192: Q4_K_M, down projections in Q8_0, experts of 5.83 bits a weight, 0.43 MB
#   width 200: Q4_K_M, down projections in F16, experts of 8.33 bits a weight, 0.64 MB
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
. "$folder/venv/bin/activate"
python -m pip install --quiet gguf==0.19.0
cd "$folder"
npm pack --silent @node-llama-cpp/linux-x64@3.22.1 | xargs tar -xzf
python - <<'EOF' 2> log || { tail log; exit 1; }
import ctypes
import glob

import gguf
import numpy as np

HIDDEN, EXPERTS, HEAD, TOKENS = 256, 4, 64, 64
random = np.random.default_rng(0)


class Parameters(ctypes.Structure):  # llama_model_quantize_params of llama.h
    _fields_ = [
        *((name, ctypes.c_int) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *((name, ctypes.c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure", "keep_split", "dry_run")),
        *((name, ctypes.c_void_p) for name in ("imatrix", "kv_overrides", "tt_overrides", "prune_layers")),
        ("rest", ctypes.c_byte * 64),
    ]


[library] = glob.glob("package/bins/linux-x64/libllama.v*.so")
llama = ctypes.CDLL(library)
llama.llama_model_quantize_default_params.restype = Parameters
llama.llama_backend_init()


def write(path: str, width: int) -> None:
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HIDDEN // HEAD)
    writer.add_head_count_kv(HIDDEN // HEAD)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(1)
    writer.add_expert_feed_forward_length(width)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<{index}>" for index in range(TOKENS)])
    writer.add_token_merges(["< 0"])
    shapes = {"token_embd": (TOKENS, HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.attn_{name}_norm": (HEAD,) for name in ("q", "k")}
    shapes |= {f"blk.0.{name}_norm": (HIDDEN,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.ffn_{name}_exps": (EXPERTS, width, HIDDEN) for name in ("gate", "up")}
    shapes |= {"blk.0.ffn_down_exps": (EXPERTS, HIDDEN, width), "blk.0.ffn_gate_inp": (EXPERTS, HIDDEN)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


for width, expected in ((256, "Q6_K"), (192, "Q8_0"), (200, "F16")):
    write("model.gguf", width)
    wanted = llama.llama_model_quantize_default_params()
    wanted.nthread, wanted.ftype = 1, gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert llama.llama_model_quantize(b"model.gguf", b"small.gguf", ctypes.byref(wanted)) == 0
    small = gguf.GGUFReader("small.gguf")
    assert small.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    experts = {tensor.name: tensor for tensor in small.tensors if "_exps" in tensor.name}
    size = sum(int(tensor.n_bytes) for tensor in experts.values())
    weights = sum(int(tensor.n_elements) for tensor in experts.values())
    down = experts["blk.0.ffn_down_exps.weight"].tensor_type.name
    print(f"width {width}: Q4_K_M, down projections in {down}, experts of {8 * size / weights:.2f} bits a weight, {size / 1e6:.2f} MB")
    assert down == expected
EOF
