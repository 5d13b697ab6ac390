# Licensed under the Apache License, Version 2.0
"""What is checked before a server starts, without one: files, widths, families and versions."""

import json
import struct
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_heapr.serving.checkpoint import check_folder, expert_tensor
from optimum_heapr.serving.errors import ServingError
from optimum_heapr.serving.families import FAMILIES, VLLM_VERSIONS, refusal
from tests.helpers import repository


WIDTHS = {"model.layers.0.mlp.experts": [3, 0], "model.layers.1.mlp.experts": [2, 4]}


@pytest.fixture
def folder(tmp_path) -> Path:
    """The experts of two layers, as checkpoints of pruned models have them."""
    tensors = {"model.embed_tokens.weight": torch.zeros(5, 8)}
    for path, widths in WIDTHS.items():
        for expert, width in enumerate(widths):
            tensors[f"{path}.{expert}.gate_proj.weight"] = torch.zeros(width, 8)
            tensors[f"{path}.{expert}.up_proj.weight"] = torch.zeros(width, 8)
            tensors[f"{path}.{expert}.down_proj.weight"] = torch.zeros(8, width)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def refused(folder, widths=WIDTHS) -> str:
    with pytest.raises(ServingError) as error:
        check_folder(folder, widths)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_checkpoint_is_accepted(folder):
    check_folder(folder, WIDTHS)


def test_what_is_no_folder_is_left_to_the_engine():
    check_folder("someone/some-model", WIDTHS)


def test_widths_that_do_not_match_are_refused(folder):
    wider = WIDTHS | {"model.layers.1.mlp.experts": [2, 5]}
    assert "model.layers.1.mlp.experts.1.down_proj.weight is 4 wide, config.json says 5" in refused(folder, wider)
    fewer = WIDTHS | {"model.layers.1.mlp.experts": [2]}
    assert "config.json says no such expert" in refused(folder, fewer)


def test_packed_experts_are_as_wide_as_their_rows(folder):
    """Eight columns are in one of a down projection."""
    tensors = load_file(folder / "model.safetensors")
    packed = {f"{name}_packed" if ".experts." in name else name: tensor[:, :1] for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in packed.items()}, folder / "model.safetensors")
    check_folder(folder, WIDTHS)
    wider = WIDTHS | {"model.layers.1.mlp.experts": [2, 5]}
    assert "_proj.weight_packed is 4 wide, config.json says 5" in refused(folder, wider)


def test_tensors_that_are_no_matrices_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    save_file(tensors | {name: tensors[name].flatten()}, folder / "model.safetensors")
    assert f"{name} is of shape [16], config.json says 2" in refused(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": null}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json is damaged, or names no files in a weight_map" in refused(folder)


def test_a_missing_expert_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if ".1.mlp.experts.0." not in name},
        folder / "model.safetensors",
    )
    assert "expert 0 of layer 1 is in none of its files" in refused(folder)


def test_a_file_cut_short_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-16])
    assert "model.safetensors cannot be read" in refused(folder)


def test_a_file_that_is_not_there_is_refused(folder):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}})
    )
    assert "model-00001-of-00002.safetensors is named in the index and not there" in refused(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    assert "no model*.safetensors" in refused(folder)


def test_plans_and_statistics_beside_the_weights_are_not_read(folder):
    (folder / "plan.safetensors").write_bytes(struct.pack("<Q", 10))
    check_folder(folder, WIDTHS)


@pytest.mark.parametrize("widths", [None, {}, {"model.layers.0.mlp.experts": "3,0"}, {"model.experts": [3]}, [3, 0]])
def test_a_configuration_of_another_format_is_refused(folder, widths):
    assert "pip install -U optimum-heapr" in refused(folder, widths)


def test_experts_are_told_from_shared_experts():
    assert expert_tensor("model.layers.3.mlp.experts.7.up_proj.weight") == (3, "7.up_proj.weight")
    assert expert_tensor("model.layers.11.block_sparse_moe.experts.0.w1.weight") == (11, "0.w1.weight")
    assert expert_tensor("model.layers.3.mlp.experts.gate_up_proj") == (3, "gate_up_proj")
    for name in ("shared_experts.up_proj.weight", "shared_expert.up_proj.weight", "gate.weight"):
        assert expert_tensor(f"model.layers.3.mlp.{name}") is None


def test_families_and_versions_that_were_not_run_are_refused_by_name():
    assert all(refusal(family, VLLM_VERSIONS[0] + ".0") is None for family in FAMILIES)
    assert refusal("jamba", VLLM_VERSIONS[0] + ".1").startswith("jamba: ")
    assert "vLLM 0.99.0" in refusal("qwen3_moe", "0.99.0")
    for reason in (refusal("jamba", VLLM_VERSIONS[0] + ".1"), refusal("qwen3_moe", "0.99.0")):
        assert 'layout="uniform"' in reason and "\n" not in reason


def test_an_unknown_vllm_keeps_its_models_and_refuses_ours(tmp_path, monkeypatch):
    """The plugin in a vLLM that it was not run with: nothing of it is imported, and nothing else changes."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from optimum_heapr.serving.plugin import register

    vllm = ModuleType("vllm")
    vllm.__version__ = "0.99.0"
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    register()
    register()
    for model_type in ("heapr_qwen3_moe", "heapr_jamba", "heapr_deepseek"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(ServingError, match="vLLM 0.99.0 is not one"):
            AutoConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    assert type(AutoConfig.from_pretrained(tmp_path)).__name__ == "Qwen3MoeConfig"


def test_vllm_finds_the_plugin():
    settings = ConfigParser()
    settings.read(repository() / "setup.cfg")
    name, _, target = settings["options.entry_points"]["vllm.general_plugins"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "heapr" and callable(getattr(import_module(module), function))
