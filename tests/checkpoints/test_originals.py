# Licensed under the Apache License, Version 2.0
"""A pruned checkpoint has the files and the configuration's keys of the original: other software reads what it always read."""

import json
import shutil

import pytest
from transformers import AutoConfig, AutoTokenizer

from optimum_heapr import HeaprPruner
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.checkpoints.originals import with_original_keys
from optimum_heapr.checkpoints.saving import apply_streaming
from tests.helpers import tiny_model, tiny_tokenizer
from tests.surgery.stock_models import layout_plan, random_plan


# What transformers 4 wrote, under the names that it reads.
OLD_KEYS = {
    "rope_theta": 5e5,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "torch_dtype": "float32",
}
CARRIED = {
    "tokenizer.json": None,  # the real one, in a layout that no library writes
    "tokenizer_config.json": None,
    "chat_template.jinja": "{{ messages[0]['content'] }}",
    "preprocessor_config.json": '{"image_processor_type": "X"}',
    "video_preprocessor_config.json": "{}",
    "processor_config.json": "{ }",
    "chat_template.json": '{"chat_template":   "x"}',
    "vocab.txt": "a\nb\n",
    "merges.txt": "",
    "generation_config.json": '{"do_sample": true,\n "top_k": 7, "transformers_version": "4.51.0"}',
    "LICENSE": "Mine.",
    "additional_chat_templates/tool.jinja": "t",
}
LEFT = {
    "training_args.bin": "x",
    "model.onnx": "x",
    "modeling_qwen3_moe.py": "x",
    ".hidden": "x",
    "README.md": "Base.",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Qwen3-MoE as transformers 4 wrote it."""
    folder = tmp_path_factory.mktemp("source") / "model"
    rope = {**OLD_KEYS["rope_scaling"], "rope_theta": OLD_KEYS["rope_theta"]}
    tiny_model("qwen3_moe", rope_parameters=rope).save_pretrained(folder)
    tiny_tokenizer(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        if name == "tokenizer_config.json":
            content["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / name).write_text(json.dumps(content, indent=7))
    config = json.loads((folder / "config.json").read_text())
    assert {"rope_parameters", "dtype"} <= set(config)
    config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
    for name in ("rope_parameters", "dtype"):
        del config[name]
    (folder / "config.json").write_text(json.dumps({**config, **OLD_KEYS, "transformers_version": "4.51.0"}))
    for name, content in {**CARRIED, **LEFT}.items():
        if content is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)
    return folder


def both_ways(source, folder, layout, **load_options):
    pruner = HeaprPruner.from_pretrained(source, **load_options)
    plan = layout_plan(pruner.model, layout)
    pruner.apply(plan)
    pruner.save_pretrained(folder / "memory")
    apply_streaming(source, plan, folder / "stream", **load_options)
    return [folder / "memory", folder / "stream"]


@pytest.mark.parametrize("layout", ["variable", "uniform", "padded"])
def test_files_are_those_of_the_original_to_the_byte(layout, source, tmp_path):
    for folder in both_ways(source, tmp_path, layout):
        for name in CARRIED:
            assert (folder / name).read_bytes() == (source / name).read_bytes(), name
        assert not [name for name in LEFT if (folder / name).exists() and name != "README.md"]
        assert "Base." not in (folder / "README.md").read_text()


@pytest.mark.parametrize("layout", ["uniform", "padded"])
def test_a_stock_configuration_keeps_the_old_keys(layout, source, tmp_path):
    original = json.loads((source / "config.json").read_text())
    for folder in both_ways(source, tmp_path, layout):
        saved = json.loads((folder / "config.json").read_text())
        assert {name: saved[name] for name in OLD_KEYS} == OLD_KEYS and saved["num_experts"] == 6
        changed = {name for name in original if saved[name] != original[name]}
        assert changed == {"moe_intermediate_size", "transformers_version"}
        before, after = (AutoConfig.from_pretrained(place).to_dict() for place in (source, folder))
        assert after["rope_parameters"] == before["rope_parameters"]
        different = {name for name in before if before[name] != after[name]}
        assert different - {"_name_or_path"} == {"moe_intermediate_size"}
        assert str(source) not in (folder / "config.json").read_text()


def test_what_pruning_or_loading_changed_has_the_new_value_under_the_old_key(source, tmp_path):
    (folder, _) = both_ways(source, tmp_path, "uniform", dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_values_keep_the_names_that_the_original_gives_them():
    """transformers 4 calls layers `mamba` and `attention`, and refuses the `linear_attention` that 5 writes in their place."""
    original = {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "intermediate_size": 16}
    config = AutoConfig.for_model("granitemoehybrid", **original)
    before = config.to_dict()
    assert before["layer_types"] != original["layer_types"], "this version writes what it read: take another family"
    config.intermediate_size = 8
    merged = with_original_keys(config.to_diff_dict(), original, config, before)
    assert {name: merged[name] for name in original} == {**original, "intermediate_size": 8}
    assert type(config).from_dict(merged).to_dict() == config.to_dict()


def test_a_class_is_spelled_as_the_original_does():
    """transformers writes the name of its own class, which vLLM does not know."""
    config = AutoConfig.for_model("phimoe", architectures=["PhimoeForCausalLM"])
    original = {"model_type": "phimoe", "architectures": ["PhiMoEForCausalLM"]}
    before = {**config.to_dict(), **original}
    merged = with_original_keys(config.to_dict(), original, config, before)
    assert merged["architectures"] == ["PhiMoEForCausalLM"]
    another = {**original, "architectures": ["PhiMoEForConditionalGeneration"]}
    merged = with_original_keys(config.to_dict(), another, config, {**before, **another})
    assert merged["architectures"] == ["PhimoeForCausalLM"]


def test_what_the_original_leaves_to_defaults_is_left_to_them():
    """transformers 5 writes that the text model of Qwen3-VL-MoE ties its embeddings, which it does not, and 4 would do."""
    original = {"text_config": {"moe_intermediate_size": 16}, "tie_word_embeddings": False}
    config = AutoConfig.for_model("qwen3_vl_moe", **original)
    before = config.to_dict()
    config.text_config.moe_intermediate_size = 8
    saved = config.to_diff_dict()
    assert "tie_word_embeddings" in saved["text_config"], "this version does not write it: take another key"
    merged = with_original_keys(saved, original, config, before)
    assert merged["text_config"] == {"moe_intermediate_size": 8} and merged["tie_word_embeddings"] is False


def test_a_variable_configuration_has_no_keys_of_another_version(source, tmp_path):
    for folder in both_ways(source, tmp_path, "variable"):
        assert not {"rope_theta", "torch_dtype"} & set(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("memory", ["plain", "streaming"])
def test_the_working_folder_may_change_in_between(memory, source, tmp_path, monkeypatch):
    monkeypatch.chdir(source.parent)
    pruner = HeaprPruner.from_pretrained(source.name, memory=memory)
    pruner.apply(layout_plan(load_model(source)[0], "uniform"))
    monkeypatch.chdir(tmp_path)
    pruner.save_pretrained("out")
    for name in CARRIED:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name


def test_an_original_that_has_gone_in_between_is_no_loss(source, tmp_path, heapr_log):
    shutil.copytree(source, tmp_path / "going")
    pruner = HeaprPruner.from_pretrained(tmp_path / "going")
    pruner.apply(layout_plan(pruner.model, "uniform"))
    shutil.rmtree(tmp_path / "going")
    pruner.save_pretrained(tmp_path / "out")
    assert "processor_config.json was there when the model was loaded and has gone" in heapr_log.text
    model, tokenizer = load_model(tmp_path / "out")
    assert model.config.moe_intermediate_size < 12 and tokenizer is not None


def test_what_the_user_changed_is_written_anew(source, tmp_path):
    pruner = HeaprPruner.from_pretrained(source)
    pruner.tokenizer.chat_template = "mine"
    pruner.model.generation_config.top_k = 3
    pruner.apply(random_plan(pruner.model, ratio=0.3))
    pruner.save_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template["default"] == "mine"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["top_k"] == 3
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == CARRIED["preprocessor_config.json"]
