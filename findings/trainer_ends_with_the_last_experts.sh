#!/usr/bin/env bash
# transformers 5.23.0: a `Trainer` with `load_best_model_at_end` ends with the experts of the last step.
#
# Expected: after training the model is that of the best checkpoint, as it is for dense models.
# Seen: attention and everything else are those of the best checkpoint; the experts, which the checkpoint holds one by one
# and the model packed, are those of the last step. A warning names missing and unexpected keys.
# Here: stated under limits; recovery trains adapters, which are not affected.
#
# Output:
#   best: run/checkpoint-3
#   attention is that of the best checkpoint: True
#   experts are those of the best checkpoint: False, of the last: True
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
. "$folder/venv/bin/activate"
python -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
python - <<'EOF'
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer, TrainingArguments

sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
sizes |= dict(num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)


def rows(ids):
    return [{"input_ids": ids + start, "labels": ids + start} for start in range(8)]


torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes))
options = dict(output_dir="run", report_to=[], use_cpu=True, disable_tqdm=True, max_steps=4, learning_rate=0.05)
options |= dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, lr_scheduler_type="constant")
options |= dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False)
data = dict(train_dataset=rows(torch.arange(8)), eval_dataset=rows(torch.arange(8).flip(0)))
trainer = Trainer(model, TrainingArguments(**options), **data)
trainer.train()
best = trainer.state.best_model_checkpoint
assert best != "run/checkpoint-4"


def same(name, folder):
    return torch.equal(model.get_parameter(name), AutoModelForCausalLM.from_pretrained(folder).get_parameter(name))


attention = same("model.layers.0.self_attn.q_proj.weight", best)
experts, last = (same("model.layers.0.mlp.experts.down_proj", folder) for folder in (best, "run/checkpoint-4"))
print(f"best: {best}\nattention is that of the best checkpoint: {attention}")
print(f"experts are those of the best checkpoint: {experts}, of the last: {last}")
assert attention and last and not experts
EOF
