# Licensed under the Apache License, Version 2.0
"""Quantizers reach the experts of variable checkpoints that are loaded as linear layers, and what they made loads again.

Skipped where the libraries are not installed; `tests/surgery/run_quantizers.sh` makes an environment that has them.
"""

import importlib.util

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from optimum_heapr import HeaprConfig, PruningPlan
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.evaluation.storage import StoredWeights
from optimum_heapr.surgery.apply import apply_plan
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
