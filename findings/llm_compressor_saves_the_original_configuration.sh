#!/usr/bin/env bash
# llmcompressor 0.14.0.1 with compressed-tensors 0.19.0 and transformers 5.17.0: `save_pretrained` writes the configuration of the folder that
# a model was loaded from, not that of the model.
#
# Expected: after `oneshot`, `model.save_pretrained` writes `model.config`, as it does before.
# Seen: `config.json` is the original's with a few fields put in, and what was said at loading is lost. Where it says how the model computes,
# what is loaded computes something else; the one line of the log says "Resaved original config with patched fields".
# Here: a pruned checkpoint that llm-compressor is to quantize is written with `experts_as="linear"` in its own `config.json`, and the guide
# says so; given at loading alone, it would be lost, and what is saved would not load.
#
# Output:
#   model.config.rms_norm_eps 0.5, saved 1e-06
#   largest difference of a logit after loading 0.84, logits up to 0.02
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
. "$folder/venv/bin/activate"
python -m pip install --quiet torch==2.13.0 llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0
cd "$folder"
python - <<'EOF' 2> messages
import json

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, LlamaConfig

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16).save_pretrained("model")
model = AutoModelForCausalLM.from_pretrained("model", rms_norm_eps=0.5)
oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"]))
ids = torch.arange(16)[None]
with torch.no_grad():
    before = model(ids).logits.float()
model.save_pretrained("out")
saved = json.load(open("out/config.json"))["rms_norm_eps"]
print(f"model.config.rms_norm_eps {model.config.rms_norm_eps}, saved {saved}")
with torch.no_grad():
    after = AutoModelForCausalLM.from_pretrained("out")(ids).logits.float()
difference, largest = (after - before).abs().max().item(), before.abs().max().item()
print(f"largest difference of a logit after loading {difference:.2f}, logits up to {largest:.2f}")
assert model.config.rms_norm_eps == 0.5 and saved == 1e-6 and difference > largest
EOF
