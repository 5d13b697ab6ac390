# Licensed under the Apache License, Version 2.0
"""Auto classes know pruned models; where the package is not installed, the files in the checkpoint do the work."""

import ast
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.modeling import configuration_heapr, modeling_heapr
from optimum_heapr.modeling.auto import is_family
from optimum_heapr.surgery.linear import from_linear_experts
from optimum_heapr.utils.errors import HeaprError
from tests.helpers import calibration_data, random_ids, tiny_model
from tests.processes import run_python


IDS = random_ids(2, 16)
TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """By model type: a folder with the pruned model, and its logits in memory."""
    made = {}
    for model_type in ("qwen2_moe", "gpt_oss", "deepseek"):
        pruner = HeaprPruner(tiny_model(model_type), config=HeaprConfig(ratio=0.4))
        pruner.statistics = calibrate(pruner.model, calibration_data(24, 24))
        pruner.prune()
        folder = tmp_path_factory.mktemp("pruned") / model_type
        pruner.save_pretrained(folder)
        made[model_type] = folder, logits(pruner.model)
    return made


def test_configuration_alone(pruned):
    folder, _ = pruned["qwen2_moe"]
    config = AutoConfig.from_pretrained(folder)
    assert type(config).__name__ == "HeaprQwen2MoeConfig" and config.model_type == "heapr_qwen2_moe"
    assert config.expert_widths == json.loads((folder / "config.json").read_text())["expert_widths"]
    assert config.heapr_config["ratio"] == 0.4
    assert type(config) is AutoConfig.for_model("heapr_qwen2_moe").__class__
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss", "deepseek"])
def test_from_config_initialises(pruned, model_type):
    """Finite numbers of the usual size, not what memory happened to hold."""
    config = AutoConfig.from_pretrained(pruned[model_type][0])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__.startswith("Heapr")
    for path, widths in config.expert_widths.items():
        experts = model.get_submodule(path)
        assert experts.widths == widths
        for parameter in experts.parameters():
            assert parameter.isfinite().all()
            assert parameter.std().item() == pytest.approx(config.initializer_range, rel=0.3)
    assert logits(model).isfinite().all()
    half = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() == model.num_parameters()


def test_without_widths_the_experts_are_stock():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = AutoConfig.for_model("heapr_qwen2_moe", vocab_size=8, num_experts=2, moe_intermediate_size=4, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model.model.layers[0].mlp.experts).__name__ == "Qwen2MoeExperts"


def test_experts_plans_of_parallelism_are_dropped(pruned):
    config = AutoConfig.from_pretrained(pruned["qwen2_moe"][0])
    assert config.base_model_tp_plan and not any(".experts" in name for name in config.base_model_tp_plan)
    assert not config.base_model_ep_plan


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "deepseek"])
def test_classes_are_found_by_name(model_type):
    """What pickle needs: the class under its name in its module is the class of the instances."""
    config = AutoConfig.for_model(f"heapr_{model_type}")
    module = sys.modules[type(config).__module__]
    assert getattr(module, type(config).__name__) is type(config)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    assert model_class.config_class is type(config)
    assert getattr(sys.modules[model_class.__module__], model_class.__name__) is model_class
    assert module.__name__.startswith("optimum_heapr.") and model_class.__module__.startswith("optimum_heapr.")


def test_modules_have_no_other_names():
    for module in (configuration_heapr, modeling_heapr):
        for name in ("Qwen3MoeConfig", "HeaprNothing", "HeaprNothingConfig", "nothing"):
            assert not hasattr(module, name)


@pytest.mark.parametrize("model_type", ["heapr_llama", "heapr_nothing", "heapr_heapr_qwen3_moe", "heapr_../auto"])
def test_unknown_types_are_still_unknown(model_type):
    with pytest.raises(ValueError, match=model_type):
        AutoConfig.for_model(model_type)
    assert is_family("qwen3_moe") and is_family("deepseek") and not is_family(model_type.removeprefix("heapr_"))


@pytest.fixture
def newer_family(monkeypatch, tmp_path):
    """What a release of transformers adds: a folder with the files of a model, and its names in two tables."""
    from transformers import models
    from transformers.models import qwen3_moe
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    folder = tmp_path / "models" / "newer_moe"
    folder.mkdir(parents=True)
    for file in Path(qwen3_moe.__file__).parent.glob("*.py"):
        code = file.read_text(encoding="utf-8").replace("Qwen3Moe", "NewerMoe").replace("qwen3_moe", "newer_moe")
        (folder / file.name.replace("qwen3_moe", "newer_moe")).write_text(code, encoding="utf-8")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder.parent)])
    monkeypatch.setitem(CONFIG_MAPPING_NAMES, "newer_moe", "NewerMoeConfig")
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._model_mapping, "newer_moe", "NewerMoeForCausalLM")
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._reverse_config_mapping, "NewerMoeConfig", "newer_moe")
    yield "newer_moe"
    is_family.cache_clear()  # the folder is gone


def test_a_family_that_is_newer_than_this_package(newer_family, tmp_path):
    settings = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    settings |= {"num_key_value_heads": 2, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(newer_family, **settings)).eval()
    pruner = HeaprPruner(model, config=HeaprConfig(ratio=0.4))
    pruner.check()
    pruner.statistics = calibrate(model, calibration_data(24, 24))
    pruner.prune()
    pruner.save_pretrained(tmp_path / "pruned")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert type(reloaded).__name__ == "HeaprNewerMoeForCausalLM" and reloaded.config.model_type == "heapr_newer_moe"
    assert torch.equal(logits(reloaded), logits(pruner.model))


def test_experts_of_a_model_within_a_model_are_refused_before_work():
    """Their checkpoints would be converted for two model types at once, and not load."""
    text = tiny_model("qwen3_moe").config
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 4, "patch_size": 2}
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**vision)))
    with pytest.raises(HeaprError, match="model type 'llava' has no experts of its own"):
        HeaprPruner(model, config=HeaprConfig(ratio=0.4)).check()
    HeaprPruner(model, config=HeaprConfig(ratio=0.5, layout="uniform")).check()


def test_installed_classes_are_used_with_trust_remote_code(pruned):
    folder, expected = pruned["qwen2_moe"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("optimum_heapr.modeling.modeling_heapr")
    assert torch.equal(logits(model), expected)


def test_files_in_the_checkpoint_need_nothing_else(pruned):
    """All that a file imports is there, in `torch`, in `transformers` or in the standard library."""
    folder, _ = pruned["qwen2_moe"]
    files = {path.stem for path in folder.glob("*.py")}
    assert files == {
        "adapters",
        "atomic_experts",
        "compiled",
        "configuration_heapr",
        "conversion",
        "half_precision",
        "linear_experts",
        "modeling_heapr",
        "operations",
        "unquantized",
    }
    for name in files:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in files
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                tops = {module.partition(".")[0] for module in modules}
                assert tops <= {"torch", "transformers", *sys.stdlib_module_names}


def last_states(model) -> torch.Tensor:
    """What the body of a model, with whatever head, gives."""
    with torch.no_grad():
        return model(input_ids=IDS[:1], output_hidden_states=True).hidden_states[-1]


OTHER_CLASSES = {
    "qwen2_moe": {"AutoModel", *(f"AutoModelFor{task}" for task in TASKS)},
    "gpt_oss": {"AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"},
    "deepseek": {"AutoModel"},
}


@pytest.mark.parametrize("model_type", OTHER_CLASSES)
def test_every_auto_class_of_the_family_loads(pruned, model_type, tmp_path):
    """The body of each is the pruned one, nothing but its head is new, and what it saves loads again."""
    folder, _ = pruned[model_type]
    expected = last_states(AutoModelForCausalLM.from_pretrained(folder))
    named = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(named) == {"AutoConfig", "AutoModelForCausalLM", *OTHER_CLASSES[model_type]}
    for name in OTHER_CLASSES[model_type]:
        auto_class = getattr(transformers, name)
        model, info = auto_class.from_pretrained(folder, output_loading_info=True)
        assert named[name] == f"{type(model).__module__.rpartition('.')[2]}.{type(model).__name__}"
        assert {key.partition(".")[0] for key in info["missing_keys"]} <= {"score", "qa_outputs"}, name
        assert not info["mismatched_keys"] and info["unexpected_keys"] <= {"lm_head.weight"}, name
        torch.testing.assert_close(last_states(model), expected, atol=1e-6, rtol=1e-6)
        model.save_pretrained(tmp_path / name)
        again, info = auto_class.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert all(torch.equal(one, other) for one, other in zip(again.parameters(), model.parameters(), strict=True))
        assert set(json.loads((tmp_path / name / "config.json").read_text())["auto_map"]) == set(named)


# Runs where `import optimum_heapr` fails whatever the Python path holds.
WITHOUT_THE_PACKAGE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "optimum_heapr":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
report = {"package": "there", "refusals": {}, "modules": {}}
try:
    import optimum_heapr
except ModuleNotFoundError:
    report["package"] = "absent"

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

arguments = json.loads(sys.argv[1])
ids = torch.tensor(arguments["ids"])
result = {}
for name, folder in arguments["folders"].items():
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        report["refusals"][name] = str(error)
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).expert_widths
    # First those whose body is made by `AutoModel`, which nobody has told of the code yet.
    for auto_class in sorted(AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map, reverse=True):
        if auto_class != "AutoConfig":
            body = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
            with torch.no_grad():
                states = body(input_ids=ids[:1], output_hidden_states=True).hidden_states[-1]
            result[f"{name} body of {auto_class}"] = states
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(folder + "-saved")
    again = AutoModelForCausalLM.from_pretrained(folder + "-saved", trust_remote_code=True)
    for step, loaded in (("loaded", model), ("again", again)):
        with torch.no_grad():
            result[f"{name} {step}"] = loaded(input_ids=ids).logits
    again.save_pretrained(folder + "-packed", save_original_format=False)
    report["modules"][name] = type(again).__module__
save_file(result, arguments["output"])
report["threads"] = torch.get_num_threads()
report["imported"] = [module for module in sys.modules if module.startswith("optimum_heapr")]
with open(arguments["report"], "w") as file:
    json.dump(report, file)
"""


def test_without_the_package(pruned, tmp_path):
    """`trust_remote_code=True` loads, saves and loads again; what was saved there loads here."""
    folders = {name: str(folder) for name, (folder, _) in pruned.items()}
    arguments = {"ids": IDS.tolist(), "folders": folders}
    arguments |= {"output": str(tmp_path / "logits.safetensors"), "report": str(tmp_path / "report.json")}
    result = run_python(WITHOUT_THE_PACKAGE, json.dumps(arguments), cwd=tmp_path, has="libraries")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["package"] == "absent" and report["imported"] == []
    assert report["threads"] == torch.get_num_threads()  # or the last bits of the logits would differ
    made = load_file(tmp_path / "logits.safetensors")
    for name, (folder, expected) in pruned.items():
        assert (
            "contains custom code" in report["refusals"][name] and "trust_remote_code=True" in report["refusals"][name]
        )
        assert report["modules"][name].startswith("transformers_modules.")
        assert torch.equal(made[f"{name} loaded"], expected) and torch.equal(made[f"{name} again"], expected)
        bodies = [states for key, states in made.items() if key.startswith(f"{name} body of")]
        assert len(bodies) == 1 + len(OTHER_CLASSES[name])
        for states in bodies:
            torch.testing.assert_close(states, last_states(AutoModelForCausalLM.from_pretrained(folder)))
        for suffix in ("-saved", "-packed"):
            saved = folder.with_name(folder.name + suffix)
            assert {path.name for path in saved.glob("*.py")} == {path.name for path in folder.glob("*.py")}
            model = AutoModelForCausalLM.from_pretrained(saved)
            assert type(model).__module__.startswith("optimum_heapr.modeling.modeling_heapr")
            assert torch.equal(logits(model), expected)


# An adapter put on its model, and one merged.
WITH_AN_ADAPTER = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
sys.modules["optimum_heapr"] = None
ids, base, adapter, merged, out = sys.argv[1:]
ids = torch.load(ids)
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model = PeftModel.from_pretrained(load(base), adapter).eval()
torch.save([model(input_ids=ids).logits, load(merged)(input_ids=ids).logits], out)
"""


def test_adapters_of_experts_without_the_package(pruned, tmp_path):
    """They were trained on linear experts; merged, the experts are packed again."""
    base = AutoModelForCausalLM.from_pretrained(pruned["qwen2_moe"][0], experts_as="linear")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    assert not torch.allclose(expected, pruned["qwen2_moe"][1], atol=0.1)
    merged = from_linear_experts(model.merge_and_unload())
    merged.save_pretrained(tmp_path / "merged")
    torch.save(IDS, tmp_path / "ids")
    files = [tmp_path / name for name in ("ids", "base", "adapter", "merged", "logits")]
    done = run_python(WITH_AN_ADAPTER, *files, cwd=tmp_path, has="libraries")
    assert done.returncode == 0, done.stderr
    put_on, alone = torch.load(tmp_path / "logits")
    assert torch.equal(put_on, expected) and torch.equal(alone, logits(merged))
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
