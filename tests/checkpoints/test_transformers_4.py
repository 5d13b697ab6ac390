# Licensed under the Apache License, Version 2.0
"""Stock layouts in software that is built on transformers 4, which runs in an environment of its own.

`HEAPR_TRANSFORMERS_4` names its Python: `python -m venv tf4 && tf4/bin/pip install transformers==4.57.6 torch==2.13.0`.
"""

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from optimum_heapr import HeaprPruner
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.checkpoints.saving import apply_streaming
from tests.helpers import tiny_tokenizer
from tests.surgery.stock_models import layout_plan


PYTHON = os.environ.get("HEAPR_TRANSFORMERS_4")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="HEAPR_TRANSFORMERS_4 does not name the Python of transformers 4.57.6"
)

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 500.0,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LATENT = {
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
MODELS = {
    "qwen3_moe": {"num_experts": 6, "head_dim": 16},
    "qwen3_moe with YaRN": {"num_experts": 6, "head_dim": 16, "rope_scaling": YARN},
    "qwen2_moe": {"num_experts": 6, "shared_expert_intermediate_size": 40},
    "mixtral": {"num_local_experts": 6, "intermediate_size": 32},
    "deepseek_v3": LATENT,
    "deepseek_v3 with YaRN": {**LATENT, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "glm4_moe": {"first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "head_dim": 16},
    "granitemoehybrid": {
        **{
            "num_local_experts": 6,
            "intermediate_size": 32,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"],
        },
        **{"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1},
    },
}

VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 40}
MODELS["qwen3_vl_moe"] = {
    "text_config": {
        **{**COMMON, "hidden_size": 40, "head_dim": 16, "num_experts": 6},
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]},
    },
    "vision_config": {**VISION, "deepstack_visual_indexes": [0]},
    "torch_dtype": "float32",
}

MAKE = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
folder, model_type, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.manual_seed(0)
auto_class = AutoModelForImageTextToText if "vision_config" in options else AutoModelForCausalLM
auto_class.from_config(AutoConfig.for_model(model_type, **options)).save_pretrained(folder)
"""
RUN = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
ids = torch.arange(96).view(2, 48) * 3 % 320
logits = {}
for name in sys.argv[2:]:
    vision = hasattr(AutoConfig.from_pretrained(name), "vision_config")
    auto_class = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model, found = auto_class.from_pretrained(name, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"], found
    assert AutoTokenizer.from_pretrained(name)("An expert").input_ids
    with torch.no_grad():
        logits[name.rsplit("/", 1)[-1]] = model.eval()(ids).logits
save_file(logits, sys.argv[1])
"""


def in_transformers_4(code, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [PYTHON, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_stock_layouts_give_the_same_logits(name, tmp_path):
    model_type, source = name.split(" ")[0], tmp_path / "source"
    options = MODELS[name] if "vision_config" in MODELS[name] else {**COMMON, **MODELS[name]}
    status, error = in_transformers_4(MAKE, source, model_type, json.dumps(options))
    assert status == 0, error
    tiny_tokenizer(source)
    tokenizer = source / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    assert "rope_parameters" not in json.loads((source / "config.json").read_text())
    folders = [source]
    for layout in ("uniform", "padded"):
        pruner = HeaprPruner.from_pretrained(source)
        plan = layout_plan(pruner.model, layout)
        pruner.apply(plan)
        folders.append(pruner.save_pretrained(tmp_path / layout))
        folders.append(apply_streaming(source, plan, tmp_path / f"{layout}-streamed"))
    status, error = in_transformers_4(RUN, tmp_path / "logits", *folders)
    assert status == 0, error
    ids = torch.arange(96).view(2, 48) * 3 % 320
    for folder in folders:
        model, _ = load_model(folder)
        with torch.no_grad():
            here = model(ids).logits
        there = load_file(tmp_path / "logits")[folder.name]
        print(f"{name} {folder.name}: {(here - there).abs().max():.1e} of {here.abs().max():.1f}")
        # Sums of some hundred float32 terms in another order, a few layers deep.
        torch.testing.assert_close(here, there, rtol=0, atol=1e-4 * float(here.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_moe"])
def test_the_variable_layout_says_what_it_needs(model_type, tmp_path):
    status, error = in_transformers_4(
        MAKE, tmp_path / "source", model_type, json.dumps({**COMMON, **MODELS[model_type]})
    )
    assert status == 0, error
    pruner = HeaprPruner.from_pretrained(tmp_path / "source")
    pruner.apply(layout_plan(pruner.model, "variable"))
    pruner.save_pretrained(tmp_path / "variable")
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1], trust_remote_code=True)"
    status, error = in_transformers_4(code, tmp_path / "variable")
    last = error.strip().splitlines()[-1]
    assert (
        status and last.startswith("ImportError: this model's experts have widths of their own") and "uniform" in last
    )
