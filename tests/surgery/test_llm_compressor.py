# Licensed under the Apache License, Version 2.0
"""llm-compressor reaches every expert of a variable checkpoint that is written with its experts as linear layers.

Skipped where it is not installed; `tests/surgery/run_llm_compressor.sh` makes an environment that has it.
"""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_heapr import HeaprConfig, HeaprPruner, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.surgery.apply import apply_plan
from optimum_heapr.surgery.linear import to_linear_experts
from tests import processes
from tests.helpers import calibration_data, random_ids, tiny_model
from tests.quantized_checkpoints import mxfp4_checkpoint, tensors_of
from tests.surgery.stock_models import random_plan


if importlib.util.find_spec("llmcompressor") is None:
    pytest.skip(
        "no llm-compressor here; tests/surgery/run_llm_compressor.sh makes an environment", allow_module_level=True
    )

LEFT_AS_THEY_ARE = ["lm_head", "re:.*mlp.gate$"]
# As reloaded by somebody who does not have the package.
RELOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM
sys.modules["optimum_heapr"] = None
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.bfloat16)
torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
print(model.generate(torch.load(sys.argv[2]), max_new_tokens=3, do_sample=False).shape)
"""


def four_bits(group_size: int | None) -> dict:
    """W4A16 with groups of columns of another size, or a scale a row."""
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.group_size = group_size
    if group_size is None:
        scheme.weights.strategy = "channel"
    return {"config_groups": {"group_0": scheme}}


# A name, the multiple of widths, what the recipe says, and the largest share of the bytes that stays.
CASES = {
    "FP8_DYNAMIC": (1, lambda: {"targets": "Linear", "scheme": "FP8_DYNAMIC"}, 0.52),
    "W4A16, a scale a row": (1, lambda: four_bits(None), 0.29),
    "W4A16, groups of 32": (32, lambda: four_bits(32), 0.30),
}


def checkpoint(folder, multiple: int):
    """Variable widths, one of them 0, in the form of linear layers."""
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16, hidden_size=128, moe_intermediate_size=96)
    plan = PruningPlan.build(
        calibrate(model, calibration_data(24, 24)), HeaprConfig(ratio=0.4, width_multiple=multiple)
    )
    next(iter(plan.kept.values()))[1] = torch.empty(0, dtype=torch.int64)
    to_linear_experts(apply_plan(model, plan)).save_pretrained(folder)
    return folder


def bytes_of_experts(folder) -> int:
    tensors = tensors_of(folder)
    return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if ".experts." in name)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=random_ids()).logits.float()


@pytest.mark.parametrize("name", CASES)
def test_experts_are_quantized_and_load_again(name, tmp_path):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    multiple, recipe, share = CASES[name]
    folder = checkpoint(tmp_path / "pruned", multiple)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    exact = logits(model)
    oneshot(model=model, recipe=QuantizationModifier(ignore=LEFT_AS_THEY_ARE, **recipe()))
    quantized = logits(model)
    assert not torch.equal(exact, quantized)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), quantized.flatten(), dim=0) > 0.8
    model.save_pretrained(tmp_path / "out")
    assert bytes_of_experts(tmp_path / "out") < share * bytes_of_experts(folder)

    torch.save(random_ids(), tmp_path / "ids")
    done = processes.run_python(RELOAD, tmp_path / "out", tmp_path / "ids", tmp_path / "logits")
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits").float(), quantized, rtol=0.02, atol=0.02)


def test_packed_experts_that_are_not_read_again_are_refused(tmp_path):
    """llm-compressor passes over them, and transformers would leave random numbers in their place."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    folder = checkpoint(tmp_path / "pruned", 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_as="packed")
    oneshot(model=model, recipe=QuantizationModifier(ignore=LEFT_AS_THEY_ARE, **four_bits(32)))
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(
        ValueError, match='experts.down_proj and .* more were not read: .* loaded with experts_as="linear"'
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_as="packed")


def test_mxfp4_in_and_fp8_out(tmp_path):
    """Pruned, from experts with biases. transformers has no such experts in FP8, and leaves what it reads of them out, as it says."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    pruner = HeaprPruner.from_pretrained(mxfp4_checkpoint(tmp_path / "source"), dequantize=True)
    pruner.apply(random_plan(pruner.model, layout="uniform", ratio=0.5, width_multiple=8))
    pruner.save_pretrained(tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.bfloat16)
    ids = random_ids() % model.config.vocab_size
    with torch.no_grad():
        exact = model(input_ids=ids).logits.float()
        ignore = ["lm_head", "re:.*router$"]
        oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=ignore))
        quantized = model(input_ids=ids).logits.float()
    assert torch.nn.functional.cosine_similarity(exact.flatten(), quantized.flatten(), dim=0) > 0.8
    model.save_pretrained(tmp_path / "out")
    for name in ("gate_proj", "up_proj", "down_proj"):
        module = f"model.layers.2.mlp.experts.5.{name}"
        stored = tensors_of(tmp_path / "out")
        assert stored[f"{module}.weight"].dtype == torch.float8_e4m3fn and stored[f"{module}.bias"].numel()
    assert bytes_of_experts(tmp_path / "out") < 0.65 * bytes_of_experts(tmp_path / "pruned")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert any(name.endswith("experts.down_proj_bias") for name in info["missing_keys"]), (
        "it loads now: say so in the guide"
    )
