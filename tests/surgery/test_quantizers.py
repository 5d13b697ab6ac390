# Licensed under the Apache License, Version 2.0
"""Quantizers reach the experts of variable checkpoints that are loaded as linear layers, and what they made loads again.

Skipped where the libraries are not installed; `tests/surgery/run_quantizers.sh` makes an environment that has them.
"""

import importlib.util

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from optimum_heapr import HeaprConfig, HeaprError, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.evaluation.perplexity import window_losses
from optimum_heapr.evaluation.storage import StoredWeights
from optimum_heapr.surgery.apply import apply_plan
from optimum_heapr.surgery.linear import from_linear_experts
from tests import processes
from tests.helpers import calibration_data, random_ids, tiny_model


LIBRARIES = ("bitsandbytes", "torchao")
if not all(importlib.util.find_spec(name) for name in LIBRARIES):
    pytest.skip("no quantizers here; tests/surgery/run_quantizers.sh makes an environment", allow_module_level=True)


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


CONFIGS = {
    "bitsandbytes NF4": (lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.35),
    "torchao int8": (torchao, 0.65),
}
# On some CPUs its kernels for 4 bits want rows in 32s and columns in 64s; findings/ has a script.
ANY_ROWS = """
for module in model.modules():
    module.support_avx512bf16_for_cpu = False
"""
# As reloaded by somebody who does not have the package.
RELOAD = f"""
import sys
import torch
from transformers import AutoModelForCausalLM
sys.modules["optimum_heapr"] = None
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.bfloat16)
{ANY_ROWS}
torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Variable widths, most of them no multiple of anything, one of them 0."""
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16, hidden_size=128, moe_intermediate_size=96)
    plan = PruningPlan.build(calibrate(model, calibration_data(24, 24)), HeaprConfig(ratio=0.4))
    next(iter(plan.kept.values()))[1] = torch.empty(0, dtype=torch.int64)
    folder = tmp_path_factory.mktemp("checkpoint")
    apply_plan(model, plan).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_are_quantized_and_load_again(name, checkpoint, tmp_path):
    make, share = CONFIGS[name]
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    with pytest.warns(
        UserWarning, match="but the routed experts, [67].% of the bytes, are in bfloat16: these are packed"
    ):
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, quantization_config=make())
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, experts_as="linear", quantization_config=make()
    )
    exec(ANY_ROWS, {"model": model})
    before, after = (sum(StoredWeights.of(one).experts.values()) for one in (plain, model))
    assert after < share * before
    with torch.no_grad():
        exact, quantized = (one(input_ids=random_ids()).logits.float() for one in (plain, model))
    assert not torch.equal(exact, quantized)
    assert nn.functional.cosine_similarity(exact.flatten(), quantized.flatten(), dim=0) > 0.8

    model.save_pretrained(tmp_path / "out")
    torch.save(random_ids(), tmp_path / "ids")
    done = processes.run_python(RELOAD, tmp_path / "out", tmp_path / "ids", tmp_path / "logits")
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits").float(), quantized, rtol=0.02, atol=0.02)


def test_any_widths_are_evaluated_where_the_kernel_for_4_bits_takes_few(tmp_path, monkeypatch, heapr_log):
    """As on a CPU with AVX512-BF16: weights are packed for its kernel by code that runs on any, and stops at these shapes."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = tiny_model("qwen3_moe", hidden_size=80, moe_intermediate_size=96)  # no layer has columns in 64s
    plan = PruningPlan.build(calibrate(model, calibration_data(24, 24)), HeaprConfig())
    apply_plan(model, plan).save_pretrained(tmp_path)
    options = {"experts_as": "linear", "quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    with torch.no_grad(), pytest.raises((AssertionError, RuntimeError), match=r"block_n|is invalid for input of size"):
        model(input_ids=random_ids())
    found = window_losses(model, [random_ids()[0]])
    assert "layers in 4 bits have shapes" in heapr_log.text
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    exec(ANY_ROWS, {"model": model})
    assert found == window_losses(model, [random_ids()[0]])


# Put on the model in 4 bits again, and merged.
RELOAD_ADAPTER = f"""
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
sys.modules["optimum_heapr"] = None
ids, base, adapter, merged, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True, dtype=torch.float32)
{ANY_ROWS}
ids = torch.load(ids)
put_on = PeftModel.from_pretrained(model, adapter).eval()(input_ids=ids).logits
torch.save([put_on, AutoModelForCausalLM.from_pretrained(merged, trust_remote_code=True)(input_ids=ids).logits], out)
"""


def test_adapters_of_experts_in_4_bits_load_again_and_merge_exactly(checkpoint, tmp_path):
    """Merged into what is dequantized: into 4 bits PEFT rounds again, as it says."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options = {"dtype": torch.float32, "experts_as": "linear", "quantization_config": nf4}
    AutoModelForCausalLM.from_pretrained(checkpoint, **options).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    exec(ANY_ROWS, {"model": base})
    model = get_peft_model(prepare_model_for_kbit_training(base), LoraConfig(r=2, target_modules="all-linear"))
    of_experts = [
        module for path, module in model.named_modules() if ".experts." in path and hasattr(module, "lora_A")
    ]
    assert sum(type(module).__name__ == "Linear4bit" for module in of_experts) == 33 == len(of_experts) - 3
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    model.train()(input_ids=random_ids(), labels=random_ids()).loss.backward()
    trained = [parameter for module in of_experts for parameter in module.parameters() if parameter.requires_grad]
    assert len(trained) == 72 and sum(one.grad is not None and bool(one.grad.any()) for one in trained) == 66
    with torch.no_grad():
        expected = model.eval()(input_ids=random_ids()).logits
    with pytest.raises(HeaprError, match="hold a Linear4bit, which cannot be packed; .* by model.dequantize"):
        from_linear_experts(model)
    model.save_pretrained(tmp_path / "adapter")

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).dequantize()
    merged = from_linear_experts(PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload())
    merged.save_pretrained(tmp_path / "merged")
    torch.save(random_ids(), tmp_path / "ids")
    files = [tmp_path / name for name in ("ids", "base", "adapter", "merged", "logits")]
    done = processes.run_python(RELOAD_ADAPTER, *files)
    assert done.returncode == 0, done.stderr[-2000:]
    for found in torch.load(tmp_path / "logits"):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["packed", "linear"])
def test_what_was_in_4_bits_and_dequantized_is_saved(form, checkpoint, tmp_path):
    """transformers cannot do that with its own models: findings/dequantized_models_do_not_save.sh."""
    options = {
        "dtype": torch.float32,
        "experts_as": form,
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True),
    }
    AutoModelForCausalLM.from_pretrained(checkpoint, **options).save_pretrained(tmp_path / "four")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "four", dtype=torch.float32).dequantize()
    model.save_pretrained(tmp_path / "out")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and again.config.experts_as == form
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), model.parameters(), strict=True))
