#!/usr/bin/env bash
# transformers 5.17.0 with compressed-tensors 0.19.0: a checkpoint in 4 bits is loaded in 4 bits, and is in bfloat16 after the first forward.
#
# Expected: weights that are loaded compressed stay so, as those of bitsandbytes and torchao do, or are taken back when they are loaded.
# Seen: the first forward replaces each by one in bfloat16, on a CPU at least, without a message. What a model takes, looked at
# after loading, is a quarter of what it takes when it is used.
# Here: the table of the guide has bytes as saved and bytes in memory after a forward, side by side.
#
# Output:
#   loaded: 59,248 bytes of linear layers; after a forward: 231,280
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
. "$folder/venv/bin/activate"
python -m pip install --quiet torch==2.13.0 llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0
cd "$folder"
python - <<'EOF' 2> messages
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, LlamaConfig

sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16).save_pretrained("model")
model = AutoModelForCausalLM.from_pretrained("model")
oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]))
model.save_pretrained("out")


def held() -> int:
    state = {name: tensor for name, tensor in loaded.state_dict().items() if "_proj" in name}
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


loaded = AutoModelForCausalLM.from_pretrained("out")
before = held()
with torch.no_grad():
    loaded(torch.arange(16)[None])
print(f"loaded: {before:,} bytes of linear layers; after a forward: {held():,}")
assert held() > 3 * before
EOF
