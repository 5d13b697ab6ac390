#!/usr/bin/env bash
# transformers 5.23.0: a checkpoint in FP8 whose rows are no whole blocks is refused with `dequantize=True`, or gets scales of other rows.
#
# Expected: `weight_block_size` says how many rows share a scale, as in DeepSeek-V3, whose `kv_a_proj_with_mqa` has 576 rows: four blocks of
# 128 and one of 64.
# Seen: the size of a block is the number of rows by the number of scales. 576 is no multiple of 5, and loading ends. 192 rows with two scales,
# of rows 0 to 127 and 128 to 191, load without a message, as if each scale were one of 96 rows.
# Here: an operation of our own fills blocks up before that of transformers sees them (`optimum_heapr/utils/fp8.py`).
#
# Output:
#   192 rows: rows 0 to 95 are 1.0, rows 96 to 191 are 4.0
#   576 rows: Weight shape (576, 128) not divisible by scale grid (5, 1).
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
. "$folder/venv/bin/activate"
python -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
python - <<'EOF' 2> messages
import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig


def load(rows):
    sizes = dict(vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=rows)
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16).save_pretrained("model")
    tensors, name = load_file("model/model.safetensors"), "model.layers.0.mlp.gate_proj.weight"
    tensors[name] = torch.ones(rows, 128).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.full((-(-rows // 128), 1), 4.0)
    tensors[f"{name}_scale_inv"][0] = 1.0  # the first 128 rows
    save_file(tensors, "model/model.safetensors", {"format": "pt"})
    config = json.loads(Path("model/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    Path("model/config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained("model", quantization_config=FineGrainedFP8Config(dequantize=True))
    return model.model.layers[0].mlp.gate_proj.weight[:, 0].float()


found = load(192)
ones = int((found == 1).sum())
print(f"192 rows: rows 0 to {ones - 1} are {found[0].item()}, rows {ones} to 191 are {found[ones].item()}", flush=True)
assert ones == 96 and (found[96:] == 4).all()
said = []
keep = logging.Handler()
keep.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers.modeling_utils").addHandler(keep)
try:
    load(576)
except RuntimeError:
    reason = next(line for line in "\n".join(said).splitlines() if line.strip().startswith(("Weight shape", "ValueError")))
    print("576 rows:", reason.strip().removeprefix("ValueError: "), flush=True)
else:
    raise SystemExit("576 rows were loaded")
EOF
if grep -qi "block" messages; then exit 1; fi
