#!/usr/bin/env bash
# transformers 5.23.0 with bitsandbytes 0.50.2 and torchao 0.18.0: a Mixture-of-Experts model that is loaded "in 4 bits" keeps its experts in bfloat16.
#
# Expected: `quantization_config` quantizes the weights, most of which are those of experts, or says what it leaves out.
# Seen: experts are two parameters a layer, quantizers look for `nn.Linear`, and only attention shrinks. No message says so, and
# `model.num_parameters()` and the configuration look as for a dense model.
# Here: `optimum-cli heapr evaluate` says in which types experts are held; pruned checkpoints of variable widths load with experts as
# linear layers (`experts_as="linear"`), which are quantized.
#
# Output:
#   bitsandbytes, 4 bits: experts torch.bfloat16, attention torch.uint8
#   torchao, int8: experts torch.bfloat16, attention Int8Tensor
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
. "$folder/venv/bin/activate"
python -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2 torchao==0.18.0
cd "$folder"
python - <<'EOF' 2> messages
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3MoeConfig, TorchAoConfig

sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
sizes |= dict(num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes), dtype=torch.bfloat16).save_pretrained("model")
for name, config in (
    ("bitsandbytes, 4 bits", BitsAndBytesConfig(load_in_4bit=True)),
    ("torchao, int8", TorchAoConfig(Int8WeightOnlyConfig())),
):
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16, quantization_config=config)
    layer = model.model.layers[0]
    experts = {type(parameter).__name__ for parameter in layer.mlp.experts.parameters()}
    weight = layer.self_attn.q_proj.weight
    attention = weight.dtype if weight.dtype == torch.uint8 else type(weight).__name__
    print(f"{name}: experts {layer.mlp.experts.gate_up_proj.dtype}, attention {attention}", flush=True)
    assert experts == {"Parameter"} and layer.mlp.experts.gate_up_proj.dtype == torch.bfloat16
    assert weight.dtype == torch.uint8 or type(weight).__name__ == "Int8Tensor", type(weight)
EOF
if grep -iE "experts|not (be )?quanti" messages; then exit 1; fi
