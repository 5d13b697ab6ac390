#!/usr/bin/env bash
# transformers 5.23.0, bitsandbytes 0.50.2: a checkpoint in 4 bits that is loaded, dequantized and saved.
#
# Expected: `model.dequantize()` leaves an ordinary model, in the type that its configuration names, which saves.
# Seen: such a model remembers how its files were read, and saving turns that round. Reading 4 bits cannot be turned round, so saving ends in
# a NotImplementedError without a message. A model that was put into 4 bits while it was loaded does save.
# Here: pruned models forget how they were read, where that cannot be turned round, so that adapters merged into what was dequantized are saved.
#
# Output:
#   quantized when loaded: saved
#   loaded in 4 bits: NotImplementedError()
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
. "$folder/venv/bin/activate"
python -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2
cd "$folder"
TORCHDYNAMO_DISABLE=1 python - <<'EOF' 2>/dev/null
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM


def said(model) -> str:
    try:
        model.dequantize(dtype=torch.float32).save_pretrained("dequantized")
    except NotImplementedError as error:
        return repr(error)
    return "saved"


sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).save_pretrained("model")
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32, quantization_config=nf4)
model.save_pretrained("four")
found = said(model), said(AutoModelForCausalLM.from_pretrained("four", dtype=torch.float32))
print("quantized when loaded:", found[0])
print("loaded in 4 bits:", found[1])
assert found == ("saved", "NotImplementedError()"), "this has changed"
EOF
