# Licensed under the Apache License, Version 2.0
"""A saved pruned model loads like any other and computes, to the bit, what it computed in memory."""

import copy
import functools
import json
import pickle

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from tests.helpers import random_ids, tiny_model, tiny_tokenizer


FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek", "deepseek_v2")
IDS = random_ids(3, 20)
EVERYTHING = torch.empty(0, dtype=torch.int64)


def make_pruner(model, empty: tuple[tuple[int, int], ...] = ((0, 1),)) -> HeaprPruner:
    """Prunes by 40 %; of the (block, expert) in `empty` nothing stays."""
    pruner = HeaprPruner(model, tiny_tokenizer(), HeaprConfig(ratio=0.4, num_samples=4, seq_length=24))
    pruner.calibrate(Dataset.from_dict({"input_ids": random_ids(4, 24).tolist()}))
    plan = pruner.plan()
    for block, expert in empty:
        list(plan.kept.values())[block][expert] = EVERYTHING
    pruner.apply(plan)
    return pruner


@functools.cache
def pruner_of(model_type: str) -> HeaprPruner:
    return make_pruner(tiny_model(model_type))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS.to(model.device)).logits.cpu()


def load(folder, **options):
    """Loads without missing a tensor."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__name__.startswith("Heapr")
    return model


def tensor_names(folder) -> set[str]:
    names = set()
    for path in folder.glob("*.safetensors"):
        if path.name.startswith("model"):
            with safe_open(path, "pt") as file:
                names |= set(file.keys())
    return names


@pytest.fixture(params=FAMILIES)
def pruner(request) -> HeaprPruner:
    return pruner_of(request.param)


def test_saved_by_the_pruner(pruner, tmp_path):
    assert pruner.save_pretrained(tmp_path / "a") == tmp_path / "a"
    first = load(tmp_path / "a")
    assert torch.equal(logits(first), logits(pruner.model))
    assert not first.training
    first.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b")), logits(pruner.model))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saved_by_the_model_alone(pruner, tmp_path):
    pruner.model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(pruner.model))


def test_sharded(pruner, tmp_path):
    pruner.save_pretrained(tmp_path / "model", max_shard_size="8KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 3
    assert not (tmp_path / "model" / "model.safetensors").exists()
    loaded = load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(pruner.model))
    loaded.save_pretrained(tmp_path / "one")
    assert torch.equal(logits(load(tmp_path / "one")), logits(pruner.model))


def test_packed(pruner, tmp_path):
    pruner.save_pretrained(tmp_path / "packed", save_original_format=False)
    pruner.save_pretrained(tmp_path / "single")
    packed = {name for name in tensor_names(tmp_path / "packed") if ".experts" in name}
    assert packed == {name for name, _ in pruner.model.named_parameters() if ".experts" in name}
    assert len(tensor_names(tmp_path / "single")) > len(tensor_names(tmp_path / "packed"))
    loaded = load(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(pruner.model))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(pruner.model))
    load(tmp_path / "single").save_pretrained(tmp_path / "repacked", save_original_format=False)
    assert tensor_names(tmp_path / "repacked") == tensor_names(tmp_path / "packed")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_bfloat16(model_type, tmp_path):
    size = "intermediate_size" if model_type in ("mixtral", "gpt_oss") else "moe_intermediate_size"
    tiny_model(model_type, **{size: 16}).save_pretrained(tmp_path / "unpruned")  # stock experts take multiples of 8
    # Loaded, not cast: `to` would round the rotary frequencies, too.
    pruner = make_pruner(AutoModelForCausalLM.from_pretrained(tmp_path / "unpruned", dtype=torch.bfloat16))
    pruner.save_pretrained(tmp_path / "half")
    loaded = load(tmp_path / "half")
    assert loaded.dtype == torch.bfloat16 and torch.equal(logits(loaded), logits(pruner.model))
    full = load(tmp_path / "half", dtype=torch.float32)
    assert full.dtype == torch.float32
    full.save_pretrained(tmp_path / "full")
    assert torch.equal(logits(load(tmp_path / "full", dtype=torch.bfloat16)), logits(pruner.model))


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_layer_without_experts(model_type, packed, tmp_path):
    pruner = make_pruner(tiny_model(model_type), empty=[(1, expert) for expert in range(6)])
    assert [0] * 6 in pruner.model.config.expert_widths.values()
    pruner.save_pretrained(tmp_path, save_original_format=not packed)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(pruner.model))
    loaded.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert loaded.generate(IDS[:, :4], max_new_tokens=2, eos_token_id=None, pad_token_id=0).shape == (3, 6)


def test_device_map_auto(pruner, tmp_path):
    pruner.save_pretrained(tmp_path / "a")
    loaded = load(tmp_path / "a", device_map="auto")
    if loaded.device.type == "cpu":
        assert torch.equal(logits(loaded), logits(pruner.model))
    else:
        torch.testing.assert_close(logits(loaded), logits(pruner.model), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
def test_offloaded_to_disk(pruner, packed, tmp_path):
    pruner.save_pretrained(tmp_path / "model", save_original_format=not packed)
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    places = {f"model.{part}": "disk" if part == "layers" else "cpu" for part in parts} | {"lm_head": "cpu"}
    loaded = load(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    assert "meta" in {parameter.device.type for parameter in loaded.parameters()}
    assert torch.equal(logits(loaded), logits(pruner.model))
    with pytest.warns(UserWarning, match="offloaded"):
        loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(pruner.model))


def test_copies_and_pickles(pruner, tmp_path):
    pruner.model.save_pretrained(tmp_path)
    for model in (pruner.model, load(tmp_path)):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(twin) is type(model) and torch.equal(logits(twin), logits(pruner.model))
            twin.save_pretrained(tmp_path / "twin")
            assert torch.equal(logits(load(tmp_path / "twin")), logits(pruner.model))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek"])
def test_tied_embeddings(model_type, tmp_path):
    pruner = make_pruner(tiny_model(model_type, tie_word_embeddings=True))
    pruner.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in tensor_names(tmp_path)
    assert torch.equal(logits(loaded), logits(pruner.model))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_implementation_is_chosen_on_loading(implementation, pruner, tmp_path):
    pruner.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model", experts_implementation=implementation)
    assert set(loaded.get_experts_implementation().values()) == {implementation}
    torch.testing.assert_close(logits(loaded), logits(pruner.model), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="nonsense"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", experts_implementation="nonsense")


def test_configuration_in_the_checkpoint(pruner, tmp_path):
    pruner.save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    plan = pruner.applied_plan
    stock = saved["model_type"].removeprefix("heapr_")
    assert saved["model_type"] == f"heapr_{stock}" and stock in FAMILIES
    assert saved["architectures"] == [type(pruner.model).__name__]
    assert saved["expert_widths"] == plan.widths and saved["heapr_config"] == plan.config.to_dict()
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(saved["auto_map"])
    for reference in saved["auto_map"].values():
        assert (tmp_path / "model" / f"{reference.partition('.')[0]}.py").is_file()
    assert HeaprConfig.from_pretrained(tmp_path / "model") == plan.config
    assert HeaprConfig.from_file(tmp_path / "model" / "heapr" / "heapr_config.json") == plan.config
    assert PruningPlan.load(tmp_path / "model").widths == plan.widths


def test_config_of_an_unpruned_model_is_refused(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(HeaprError, match="has no heapr_config; name a model that was pruned"):
        HeaprConfig.from_pretrained(tmp_path)


def test_tokenizer_and_generation_config_are_saved(tmp_path):
    model = tiny_model("qwen3_moe")
    model.generation_config.update(do_sample=True, temperature=0.3, top_k=7)
    pruner = make_pruner(model)
    pruner.save_pretrained(tmp_path)
    assert load(tmp_path).generation_config.top_k == 7
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.3
    text = "An expert is a sum of atomic experts"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek"])
def test_lora_on_attention(model_type, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    pruner_of(model_type).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load(tmp_path / "model"), config).train()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    trained = logits(model.eval())
    assert not torch.equal(trained, logits(pruner_of(model_type).model))

    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "adapter")), trained)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), trained, atol=1e-4, rtol=1e-4)


def test_full_training_changes_experts_and_reloads(tmp_path):
    model = copy.deepcopy(pruner_of("qwen2_moe").model).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model.eval()))
