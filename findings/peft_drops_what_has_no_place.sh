#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0): loading an adapter onto a model that lacks some of the adapted layers.
#
# Expected: as `load_state_dict` does, an error, or at least a warning that names the tensors of the adapter that have no place in the
# model.
# Instead: `PeftModel.from_pretrained` loads those that have one and says nothing of the rest. Only missing tensors are warned of, and
# only an adapter that matches no layer at all is an error.
# What this project does about it: pruned experts are linear layers or packed parameters, so an adapter on linear experts would lose
# all it has for experts on a packed model. Pruned models look at what PEFT hands them, and raise (modeling/adapters.py).
#
# Output seen on 2026-11-29:
#   warnings: []
#   kept: ['a.lora_A', 'a.lora_B'] of ['a.lora_A', 'a.lora_B', 'b.lora_A', 'b.lora_B']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - "$folder/adapter" <<'PY'
import sys
import warnings

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

folder = sys.argv[1]
get_peft_model(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}), LoraConfig(r=2, target_modules=["a", "b"])).save_pretrained(folder)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = PeftModel.from_pretrained(nn.ModuleDict({"a": nn.Linear(4, 4)}), folder)


def layers(names):
    return sorted(name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default") for name in names if "lora_" in name)


with safe_open(f"{folder}/adapter_model.safetensors", "pt") as file:
    saved = layers(file.keys())
kept = layers(name for name, _ in model.named_parameters())
print("warnings:", [str(one.message) for one in said])
print("kept:", kept, "of", saved)
sys.exit(bool(said) or kept != saved[:2])
PY
