# Licensed under the Apache License, Version 2.0
"""Pruned models of variable widths in vLLM: log-probabilities are those of transformers.

Skipped where vLLM is not installed; `tests/serving/run_vllm.sh` makes an environment that has it, and runs these.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os

import pytest
import torch


if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; tests/serving/run_vllm.sh makes an environment", allow_module_level=True)

from optimum_heapr.serving.errors import ServingError  # noqa: E402
from optimum_heapr.serving.families import FAMILIES  # noqa: E402
from tests.serving.engine import largest_difference, log_probabilities, served  # noqa: E402
from tests.serving.variable_models import (  # noqa: E402
    CONFIGS,
    SMALL,
    padded_checkpoint,
    variable_checkpoint,
    variable_model,
)


pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def one_engine_at_a_time():
    yield
    gc.collect()


# Latent attention has a kernel of its own in vLLM: what is compared here are the experts.
OTHERWISE = ("deepseek_v2", "deepseek_v3")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in OTHERWISE])
def test_log_probabilities_are_those_of_transformers(family, tmp_path):
    model = variable_checkpoint(tmp_path, family)
    difference = largest_difference(model, log_probabilities(served(tmp_path)))
    print(f"\n{family}: {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize("family", [family for family in OTHERWISE if family in FAMILIES])
def test_log_probabilities_are_those_of_the_stock_model_with_zeros(family, tmp_path):
    padded_checkpoint(tmp_path / "padded", family, variable_checkpoint(tmp_path / "pruned", family))
    expected = log_probabilities(served(tmp_path / "padded"))
    actual = log_probabilities(served(tmp_path / "pruned"))
    assert [ids for ids, _ in actual] == [ids for ids, _ in expected]
    difference = max((a - b).abs().max().item() for (_, a), (_, b) in zip(actual, expected))
    print(f"\n{family}, against vLLM's stock model: {difference:.1e}")
    assert difference < 1e-4


def test_packed_checkpoints_are_read(tmp_path):
    model = variable_model("qwen3_moe")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert largest_difference(model, log_probabilities(served(tmp_path))) < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs have kernels that know where experts are")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_tokens_in_parts(family, tmp_path, monkeypatch):
    """More tokens than are worked on at once, and a last one by itself."""
    from optimum_heapr.serving import on_cpu

    monkeypatch.setattr(on_cpu, "TOKENS_AT_ONCE", 3)
    model = variable_checkpoint(tmp_path, family)
    assert largest_difference(model, log_probabilities(served(tmp_path))) < 1e-4


def test_compiled(tmp_path):
    """With torch.compile as vLLM uses it: how many tokens a group gets is hidden from the compiler."""
    model = variable_checkpoint(tmp_path, "qwen3_moe")
    engine = served(tmp_path, enforce_eager=False)
    assert largest_difference(model, log_probabilities(engine)) < 1e-4


def expert_elements(model) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".groups." in name)


def test_memory_of_experts(tmp_path):
    """The weights that vLLM holds are those of the pieces: the widths, rounded up to what kernels ask for, and few zeros."""
    model = variable_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=2, moe_intermediate_size=512)
    [held] = served(tmp_path).apply_model(expert_elements)
    widths = [width for layer in model.config.expert_widths.values() for width in layer]
    assert 3 * 64 * sum(widths) <= held <= 1.08 * 3 * 64 * sum(32 * -(-width // 32) for width in widths)


@pytest.mark.parametrize("folder", [folder for folder in os.environ.get("HEAPR_PRUNED", "").split(":") if folder])
def test_trained_models(folder):
    """Folders of pruned models that `HEAPR_PRUNED` names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    difference = largest_difference(model, log_probabilities(served(folder)))
    print(f"\n{folder}: {difference:.1e}")
    assert difference < 1e-4


def test_other_models_are_not_touched(tmp_path):
    """The plugin is loaded, and a stock model has vLLM's experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SMALL | CONFIGS["qwen3_moe"])).eval()
    model.save_pretrained(tmp_path)
    engine = served(tmp_path)
    assert engine.apply_model(expert_elements) == [0]
    assert largest_difference(model, log_probabilities(engine)) < 1e-4


def test_transformers_has_pruned_models_in_the_same_process(tmp_path):
    """vLLM is told of them where it reads configurations: the auto classes load and save as they do without it."""
    from transformers import AutoModelForCausalLM

    model = variable_checkpoint(tmp_path / "pruned", "qwen3_moe")
    found = log_probabilities(served(tmp_path / "pruned"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert type(loaded) is type(model)
    assert largest_difference(loaded, found) < 1e-4
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "heapr_qwen3_moe"


def refused(folder, **options) -> str:
    with pytest.raises(ServingError) as error:
        served(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_served_is_refused_before_anything_is_loaded(tmp_path):
    variable_checkpoint(tmp_path, "qwen3_moe")
    assert "expert parallelism" in refused(tmp_path, enable_expert_parallel=True)
    assert "adapters of experts" in refused(tmp_path, enable_lora=True, lora_target_modules=["experts"])

    config = json.loads((tmp_path / "config.json").read_text())
    wider = json.loads(json.dumps(config))
    wider["expert_widths"]["model.layers.0.mlp.experts"][1] += 1
    (tmp_path / "config.json").write_text(json.dumps(wider))
    assert "config.json says" in refused(tmp_path)

    (tmp_path / "config.json").write_text(json.dumps(config | {"expert_widths": {"version": 9}}))
    assert "pip install -U optimum-heapr" in refused(tmp_path)

    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "heapr_dots1"}))
    assert refused(tmp_path).startswith("dots1: ")

    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be read" in refused(tmp_path)
