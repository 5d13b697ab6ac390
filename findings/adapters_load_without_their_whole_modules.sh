#!/usr/bin/env bash
# transformers 5.17.0 with peft 0.21.0: an adapter's folder that holds whole modules loads by name into another model.
#
# Expected: `AutoModelForCausalLM.from_pretrained(ADAPTER)` computes what the model with the adapter computed that was saved, as
# `PeftModel.from_pretrained(base, ADAPTER)` does, of `modules_to_save` (routers and norms, say) too.
# Seen: no error. The modules are wrapped before the base's weights are read, whose names then fit nothing; of what is trained in them
# nothing arrives. The loading report names them as missing and unexpected, and the logits are others.
# Here: what is missing is refused, so such an adapter does not load by name with that version; 5.19 loads it.
#
# Output:
#   by PeftModel the logits are those that were saved: True
#   by name they are: False
#   missing: 3, all of them of modules_to_save: True
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
. "$folder/venv/bin/activate"
python -m pip install --quiet torch==2.13.0 transformers==5.17.0 peft==0.21.0
cd "$folder"
python - 2> log <<'PYTHON' || { cat log; exit 1; }
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
sizes |= dict(num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
torch.manual_seed(0)
AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes)).save_pretrained("base")
adapted = get_peft_model(
    AutoModelForCausalLM.from_pretrained("base"),
    LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate", "input_layernorm", "post_attention_layernorm"]),
)
for parameter in adapted.parameters():
    if parameter.requires_grad:
        torch.nn.init.normal_(parameter, std=0.3)
adapted.save_pretrained("adapter")
ids = torch.arange(16)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids).logits


saved = logits(adapted)
by_peft = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter"))
model, info = AutoModelForCausalLM.from_pretrained("adapter", output_loading_info=True)
one, other = torch.allclose(saved, by_peft, atol=1e-5), torch.allclose(saved, logits(model), atol=1e-2)
missing = info["missing_keys"]
whole = all("modules_to_save" in name for name in missing)
print(f"by PeftModel the logits are those that were saved: {one}\nby name they are: {other}")
print(f"missing: {len(missing)}, all of them of modules_to_save: {whole}")
assert one and not other and len(missing) == 3 and whole
PYTHON
