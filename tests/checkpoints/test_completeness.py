# Licensed under the Apache License, Version 2.0
"""A checkpoint that lacks weights is refused by the names of what is missing, however it is loaded; tied heads need not be there."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.checkpoints.saving import apply_streaming
from tests.helpers import tiny_model
from tests.surgery.stock_models import layout_plan


FIRST = "model.layers.1.mlp.experts.0"
BLOCK = "model.layers.1.mlp.experts"


def renamed(name):
    return name.replace("mlp.experts", "moe.experts")


# What is done to the names of the checkpoint, and what the refusal says.
DAMAGES = {
    "one tensor": (
        lambda name: None if name == f"{FIRST}.up_proj.weight" else name,
        f"1 of its tensors: {FIRST}.up_proj.weight;",
    ),
    "one expert": (
        lambda name: None if f"{FIRST}." in name else name,
        f"3 of its tensors: {FIRST}.down_proj.weight, {FIRST}.gate_proj.weight, {FIRST}.up_proj.weight;",
    ),
    "the last expert": (
        lambda name: None if "layers.0.mlp.experts.5.down" in name else name,
        "1 of its tensors: model.layers.0.mlp.experts.5.down_proj.weight;",
    ),
    "one kind of tensor": (
        lambda name: None if "layers.0.mlp.experts" in name and "gate_proj" in name else name,
        "6 of its tensors",
    ),
    "all experts of a layer": (
        lambda name: None if BLOCK in name else name,
        f"2 of its tensors: {BLOCK}.down_proj, {BLOCK}.gate_up_proj;",
    ),
    "another prefix": (renamed, "36 in it belong to nothing: model.layers.0.moe.experts.0.down_proj.weight"),
    "the router": (
        lambda name: None if "layers.0.mlp.gate.weight" in name else name,
        "model.layers.0.mlp.gate.weight;",
    ),
    "the last norm": (lambda name: None if name == "model.norm.weight" else name, "model.norm.weight;"),
    "the head": (lambda name: None if name == "lm_head.weight" else name, "lm_head.weight;"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    tiny_model().save_pretrained(folder)
    return folder


def damaged(folder, target, rename):
    """A copy whose tensors have other names, or are not there where `rename` gives none."""
    shutil.copytree(folder, target)
    for path in target.glob("*.safetensors"):
        tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
        tensors.pop(None, None)
        save_file(tensors, path, {"format": "pt"})
    return target


@pytest.mark.parametrize(
    "options", [{}, {"skeleton": True}, {"device_map": "cpu"}], ids=["plain", "streaming", "mapped"]
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_missing_is_named(damage, options, whole, tmp_path):
    rename, expected = DAMAGES[damage]
    folder = damaged(whole, tmp_path / "damaged", rename)
    with pytest.raises(HeaprError) as caught:
        load_model(folder, **options)
    text = str(caught.value)
    assert text.startswith(f"model={str(folder)!r}: its checkpoint lacks ") and expected in text and "\n" not in text
    assert text.endswith("; download it again, or name one that is whole")


def test_shapes_that_do_not_fit_are_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(path), "model.norm.weight": torch.ones(5)}, path, {"format": "pt"})
    for options in ({}, {"skeleton": True}):
        with pytest.raises(
            HeaprError, match=r"shapes that its config.json says \(model.norm.weight \[5\], not \[32\]\)"
        ):
            load_model(tmp_path / "model", **options)


def test_file_by_file_and_in_memory_say_the_same(whole, tmp_path):
    folder = damaged(whole, tmp_path / "damaged", DAMAGES["one expert"][0])
    plan, refusals = layout_plan(tiny_model(), "variable"), []
    for run in (
        lambda: apply_streaming(folder, plan, tmp_path / "out"),
        lambda: HeaprPruner.from_pretrained(folder),
        lambda: HeaprPruner.from_pretrained(folder, HeaprConfig(dataset="demo"), memory="streaming"),
        lambda: HeaprPruner.from_pretrained(folder, HeaprConfig(dataset="demo"), memory="auto"),
        lambda: HeaprPruner.from_pretrained(
            folder, HeaprConfig(dataset="demo"), memory="offload", offload_folder=tmp_path
        ),
    ):
        with pytest.raises(HeaprError) as caught:
            run()
        refusals.append(str(caught.value))
    assert len(set(refusals)) == 1 and DAMAGES["one expert"][1] in refusals[0]
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_pruned_folder_that_lacks_experts(packed, tmp_path):
    pruner = HeaprPruner(tiny_model())
    pruner.apply(layout_plan(pruner.model, "variable"))
    pruner.save_pretrained(tmp_path / "pruned", save_original_format=not packed)
    load_model(tmp_path / "pruned")
    folder = damaged(tmp_path / "pruned", tmp_path / "damaged", lambda name: None if BLOCK in name else name)
    with pytest.raises(HeaprError, match=rf"lacks \d+ of its tensors: {BLOCK}"):
        load_model(folder)
    if not packed:
        one = damaged(tmp_path / "pruned", tmp_path / "one", DAMAGES["one tensor"][0])
        with pytest.raises(HeaprError, match=rf"lacks 1 of its tensors: {FIRST}.up_proj.weight"):
            load_model(one)


def test_an_adapter_and_the_model_that_it_is_put_on(whole, tmp_path):
    from peft import LoraConfig, get_peft_model

    shutil.copytree(whole, tmp_path / "base")
    model, _ = load_model(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path / "adapter")
    loaded, _ = load_model(tmp_path / "adapter")
    assert any("lora_A" in name for name, _ in loaded.named_parameters())
    half = damaged(
        tmp_path / "adapter", tmp_path / "half", lambda name: None if "layers.1" in name and "lora_A" in name else name
    )
    with pytest.raises(HeaprError, match="half': its checkpoint lacks 1 of its tensors: .*lora_A"):
        load_model(half)
    shutil.rmtree(tmp_path / "base")
    damaged(whole, tmp_path / "base", DAMAGES["the router"][0])
    with pytest.raises(
        HeaprError, match="base': its checkpoint lacks 1 of its tensors: model.layers.0.mlp.gate.weight"
    ):
        load_model(tmp_path / "adapter")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek"])
@pytest.mark.parametrize("tied", [False, True])
def test_whole_checkpoints_load(family, tied, tmp_path):
    tiny_model(family, tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    assert ("lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")) != tied
    for options in ({}, {"skeleton": True}):
        model, _ = load_model(tmp_path / "model", **options)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
