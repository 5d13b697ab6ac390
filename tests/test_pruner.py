# Licensed under the Apache License, Version 2.0
"""`HeaprPruner`, step by step and in one go."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from optimum_heapr import AtomicStatistics, HeaprConfig, HeaprError, HeaprPruner, PruningPlan, RecoveryConfig
from optimum_heapr import pruner as pruner_module
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.checkpoints.saving import apply_streaming
from optimum_heapr.text.samples import load_calibration_data
from optimum_heapr.utils import placement
from tests.helpers import CHAT_TEMPLATE, SENTENCES, calibration_data, random_ids, tiny_model, tiny_tokenizer


IDS = random_ids(4, 24)
SAMPLES = {"num_samples": 4, "seq_length": 24}


def tokens() -> Dataset:
    return Dataset.from_dict({"input_ids": IDS.tolist()})


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES * 2))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An unpruned model on disk."""
    folder = tmp_path_factory.mktemp("unpruned")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def make(**options) -> HeaprPruner:
    return HeaprPruner(tiny_model(), tiny_tokenizer(), HeaprConfig(**{**SAMPLES, **options}))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def equal(first: AtomicStatistics, second: AtomicStatistics) -> bool:
    same = [
        torch.equal(getattr(block, name), getattr(second.blocks[path], name))
        for path, block in first.blocks.items()
        for name in ("activation_sq_sum", "gradient_sq_sum", "fisher_sum", "token_count")
    ]
    return first.blocks.keys() == second.blocks.keys() and all(same)


def test_a_config_of_another_type_is_refused(tmp_path):
    for wrong in ({"ratio": 0.5}, "recipe.yaml", RecoveryConfig()):
        expected = f"config: is of type {type(wrong).__name__}; pass a HeaprConfig, such as HeaprConfig.from_file"
        with pytest.raises(HeaprError, match=expected):
            HeaprPruner(tiny_model(), None, wrong)
        with pytest.raises(HeaprError, match=expected):
            HeaprPruner.from_pretrained(tmp_path / "not looked at", wrong)
    pruner = make()
    pruner.calibrate(tokens())
    pruner.prune()
    with pytest.raises(HeaprError, match="config: is of type HeaprConfig; pass a RecoveryConfig"):
        pruner.recover(tokens(), HeaprConfig())


def test_streaming_has_no_device_map():
    with pytest.raises(HeaprError, match="device_map='auto': memory='streaming' takes one layer at a time"):
        HeaprPruner.from_pretrained("demo", HeaprConfig(), memory="streaming", device_map="auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_devices_that_are_not_there_are_refused():
    with pytest.raises(
        HeaprError, match="device_map='cuda': the model cannot go there .*; name devices that are there"
    ):
        load_model("demo", device_map="cuda")


def test_a_model_is_measured_on_the_accelerator_with_saved_statistics_too(monkeypatch):
    statistics, pruner, moved = make().calibrate(tokens()), make(eval_samples=1), []
    pruner.calibration_data = load_calibration_data(pruner.config, None, tokens())
    plan = pruner.plan(statistics)
    monkeypatch.setattr(placement, "has_accelerator", lambda: True)
    monkeypatch.setattr(placement, "default_device", lambda: moved.append("there") or "cpu")
    pruner.apply(plan)
    assert not moved
    pruner = make(eval_samples=1)
    pruner.calibration_data = load_calibration_data(pruner.config, None, tokens())
    pruner.apply(plan, measure=True)
    assert moved == ["there"]


def test_calibrate_takes_data_in_every_form(text):
    pruner = make(dataset=text)
    own = pruner.calibrate()
    assert pruner.statistics is own and own.num_tokens == 4 * 24
    assert equal(own, make().calibrate(text))
    assert equal(own, make(num_samples=1).calibrate(HeaprConfig(dataset=text, **SAMPLES)))
    assert equal(own, make().calibrate(Dataset.from_dict({"text": SENTENCES * 2})))
    assert not equal(own, make(dataset=text, seed=1).calibrate())
    assert make(dataset=text).calibrate(tokens()).fingerprint["data"]["source"] == "Dataset"

    # Token ids are used as they are: no choice of samples, so no seed.
    assert equal(make().calibrate(tokens()), make(seed=5).calibrate(tokens()))


def test_calibrate_takes_messages():
    rows = [[{"role": "user", "content": sentence}] for sentence in SENTENCES * 2]
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    pruner = HeaprPruner(tiny_model(), tokenizer, HeaprConfig(**SAMPLES))
    assert pruner.calibrate(Dataset.from_dict({"messages": rows})).num_tokens == 4 * 24


def test_calibrate_leaves_the_model_as_it_was():
    model = tiny_model().train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    implementation = model.get_experts_implementation()
    HeaprPruner(model, config=HeaprConfig(**SAMPLES)).calibrate(tokens())
    assert model.training and model.get_experts_implementation() == implementation
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is None and torch.equal(parameter, before[name])


def test_plan_from_statistics_at_hand_given_or_on_disk(tmp_path):
    pruner = make(ratio=0.3)
    with pytest.raises(HeaprError, match="call calibrate()"):
        pruner.plan()
    statistics = pruner.calibrate(tokens())
    statistics.save(tmp_path / "s.safetensors")
    plans = [pruner.plan(), pruner.plan(statistics), pruner.plan(tmp_path / "s.safetensors")]
    plans.append(make(ratio=0.3).plan(str(tmp_path / "s.safetensors")))
    for plan in plans:
        assert plan.widths == plans[0].widths and plan.ratio == pytest.approx(0.3, abs=0.01)


def test_changes_hold_for_one_plan_alone():
    pruner = make(ratio=0.3)
    pruner.calibrate(tokens())
    plan = pruner.plan(ratio=0.5, criterion="magnitude")
    assert plan.config == pruner.config.replace(ratio=0.5, criterion="magnitude")
    assert plan.ratio == pytest.approx(0.5, abs=0.01) and pruner.config.ratio == 0.3
    with pytest.raises(HeaprError, match='did you mean "ratio"'):
        pruner.plan(ratoi=0.5)
    with pytest.raises(HeaprError, match="ratio=1.5"):
        pruner.plan(ratio=1.5)


def test_two_ratios_without_the_data(monkeypatch, tmp_path):
    statistics = make().calibrate(tokens())
    statistics.save(tmp_path / "s.safetensors")
    monkeypatch.setattr(pruner_module, "load_calibration_data", lambda *args: pytest.fail("the data was read again"))
    for ratio in (0.2, 0.6):
        pruner = make()
        pruner.statistics = AtomicStatistics.load(tmp_path / "s.safetensors")
        model = pruner.prune(ratio=ratio)
        assert pruner.applied_plan.ratio == pytest.approx(ratio, abs=0.01)
        assert model.config.heapr_config["ratio"] == ratio
    assert equal(statistics, pruner.statistics)


def test_apply_takes_a_plan_or_its_file(tmp_path):
    pruner = make(ratio=0.4)
    pruner.calibrate(tokens())
    plan = pruner.plan()
    plan.save(tmp_path / "plan.safetensors")
    expected = logits(pruner.apply(plan))
    assert pruner.applied_plan is plan
    other = make()  # needs neither data nor statistics
    assert torch.equal(logits(other.apply(tmp_path / "plan.safetensors")), expected)
    assert other.applied_plan.config.ratio == 0.4


def test_prune_is_calibrate_plan_and_apply(text):
    steps = make(dataset=text)
    statistics = steps.calibrate()
    expected = logits(steps.apply(steps.plan(statistics, ratio=0.5)))
    one = make(dataset=text)
    model = one.prune(ratio=0.5)
    assert model is one.model and torch.equal(logits(model), expected)
    assert one.statistics is not None and one.applied_plan.config.ratio == 0.5


def test_prune_measures_as_the_changes_say(text):
    pruner = make()
    pruner.prune(dataset=text, num_samples=2, seed=3)
    assert pruner.statistics.fingerprint["data"]["num_samples"] == 2
    assert pruner.statistics.fingerprint["seed"] == 3 and pruner.applied_plan.config.dataset == text


def test_from_pretrained(folder, text, tmp_path):
    config = HeaprConfig(ratio=0.25, dataset=text, **SAMPLES)
    pruner = HeaprPruner.from_pretrained(folder, config)
    assert pruner.config is config and pruner.tokenizer is not None and pruner.model.dtype == torch.float32
    assert HeaprPruner.from_pretrained(str(folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16
    pruner.prune()
    pruner.save_pretrained(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert {"heapr", "modeling_heapr.py", "README.md"} <= names
    assert HeaprConfig.from_pretrained(tmp_path / "out") == config.public()
    assert PruningPlan.load(tmp_path / "out").widths == pruner.applied_plan.widths
    assert equal(AtomicStatistics.load(tmp_path / "out" / "heapr" / "statistics.safetensors"), pruner.statistics)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(pruner.model))
    with pytest.raises(HeaprError, match="pruned already"):
        HeaprPruner.from_pretrained(tmp_path / "out")


def test_a_model_without_a_tokenizer(folder, tmp_path):
    """For some families transformers then makes a tokenizer that knows no text; calibrating with it would be silent."""
    tiny_model().save_pretrained(tmp_path / "mute")
    assert load_model(folder)[1] is not None and load_model(tmp_path / "mute")[1] is None
    pruner = HeaprPruner.from_pretrained(tmp_path / "mute", HeaprConfig(**SAMPLES))
    with pytest.raises(HeaprError, match="no tokenizer"):
        pruner.calibrate(Dataset.from_dict({"text": SENTENCES}))
    pruner.calibrate(tokens())
    pruner.prune()
    pruner.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_nothing_to_save_before_pruning(tmp_path):
    pruner = make()
    pruner.calibrate(tokens())
    pruner.plan()
    with pytest.raises(HeaprError, match=r"not pruned yet; call prune\(\) or apply\(\)"):
        pruner.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_save_refuses_a_shard_size_that_is_none(tmp_path):
    pruner = HeaprPruner.from_pretrained(
        "demo", HeaprConfig(dataset="demo", num_samples=2, seq_length=32, eval_samples=0)
    )
    pruner.prune()
    with pytest.raises(HeaprError, match="max_shard_size='5XB': must be a number of bytes"):
        pruner.save_pretrained(tmp_path / "pruned", max_shard_size="5XB")
    with pytest.raises(HeaprError, match="max_shard_size='5XB': must be a number of bytes"):
        apply_streaming("demo", pruner.applied_plan, tmp_path / "pruned", max_shard_size="5XB")
    assert not list(tmp_path.iterdir())


def test_save_refuses_a_filled_folder(tmp_path):
    pruner = make()
    pruner.calibrate(tokens())
    pruner.prune()
    pruner.save_pretrained(tmp_path)
    with pytest.raises(HeaprError, match="not empty; name another"):
        pruner.save_pretrained(tmp_path)
    written = (tmp_path / "config.json").stat().st_mtime_ns
    assert pruner.save_pretrained(tmp_path, overwrite=True) == tmp_path
    assert (tmp_path / "config.json").stat().st_mtime_ns > written
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card + "mine")
    with pytest.raises(HeaprError, match="holds 'README.md', which was changed after this package wrote it"):
        pruner.save_pretrained(tmp_path, overwrite=True)
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HeaprError, match="holds 'notes.txt', which this package has no record of writing"):
        pruner.save_pretrained(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_models_that_cannot_be_pruned_are_refused_at_once():
    with pytest.raises(HeaprError, match="has no routed experts"):
        HeaprPruner(tiny_model("llama"))
    pruner = make()
    pruner.calibrate(tokens())
    model = pruner.prune()
    with pytest.raises(HeaprError, match="pruned already; start from the unpruned model"):
        HeaprPruner(model)
    with pytest.raises(HeaprError, match="pruned already"):
        pruner.plan(ratio=0.5)


def test_statistics_of_another_model_are_refused():
    statistics = make().calibrate(tokens())
    pruner = HeaprPruner(tiny_model(seed=1))
    with pytest.raises(
        HeaprError, match="statistics: made for a model with .* this model has .*; calibrate this model"
    ):
        pruner.plan(statistics)


def test_errors_of_loading_name_the_model(tmp_path):
    with pytest.raises(HeaprError, match=r"model='.*nowhere': no such folder.*; name a folder"):
        load_model(tmp_path / "nowhere")
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").unlink()
    with pytest.raises(HeaprError, match=r"model='.*llama': cannot be loaded .*model\.safetensors"):
        load_model(tmp_path / "llama")


def test_options_of_the_config_are_not_options_of_loading(tmp_path):
    with pytest.raises(
        HeaprError, match=r"ratio=0.3: is an option of HeaprConfig; pass config=HeaprConfig\(ratio=0.3\)"
    ):
        HeaprPruner.from_pretrained(tmp_path, ratio=0.3)


def test_the_model_is_not_saved_over_what_it_was_loaded_from(tmp_path):
    source = tmp_path / "source"
    tiny_model("qwen3_moe").save_pretrained(source)
    tiny_tokenizer(source)
    pruner = HeaprPruner.from_pretrained(source, HeaprConfig(ratio=0.4, num_samples=4, seq_length=24))
    pruner.calibrate(Dataset.from_dict({"input_ids": random_ids(4, 24).tolist()}))
    pruner.apply(pruner.plan())
    before = sorted(tmp_path.rglob("*"))
    for folder, what in ((source, "is the input"), (source / "pruned", "lies inside"), (tmp_path, "holds the input")):
        with pytest.raises(HeaprError, match=f"^folder='{folder}': {what}"):
            pruner.save_pretrained(folder, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_of_connected_processes_the_first_writes(tmp_path, monkeypatch, heapr_log):
    """As transformers does it, which all processes call to save; a second folder would lack what that writes."""
    pruner = HeaprPruner(tiny_model())
    pruner.statistics = calibrate(pruner.model, calibration_data(24, 24), 1)
    pruner.apply(pruner.plan())
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr("torch.distributed.get_rank", lambda *_, rank=rank: rank)
        assert pruner.save_pretrained(tmp_path / "pruned") == tmp_path / "pruned"
        assert (tmp_path / "pruned" / "model.safetensors").exists() == (rank == 0)
    monkeypatch.setattr("torch.distributed.get_rank", lambda *_: 1)
    assert pruner.push_to_hub("somebody/pruned") is None
    said = [record.getMessage() for record in heapr_log.records if "is written" in record.getMessage()]
    rest = "nothing is written by this process, rank 1 of 2; rank 0 writes"
    assert said == [f"folder='{tmp_path / 'pruned'}': {rest}", f"repo_id='somebody/pruned': {rest}"]
