# Licensed under the Apache License, Version 2.0
"""`import optimum_heapr` is light, and registers pruned models whenever transformers' auto classes come."""

import json
import subprocess
import sys

import pytest

from optimum_heapr import HeaprConfig, PruningPlan
from optimum_heapr.report.content import build_report
from tests import processes
from tests.helpers import random_statistics


# Model families whose modeling code was imported; the auto classes' own tables are no family.
MODELING_MODULES = """
def modeling_modules():
    import sys
    found = [name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
    return [name for name in found if not name.startswith("transformers.models.auto.")]
"""


def run_python(code: str):
    """What the code prints as JSON on its last line, run in a fresh interpreter."""
    result = subprocess.run([sys.executable, "-c", MODELING_MODULES + code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def seconds_to_import(module: str) -> float:
    return run_python(
        "import json, time\nstart = time.perf_counter()\n"
        f"import {module}\nprint(json.dumps(time.perf_counter() - start))"
    )


def test_import_is_light():
    found = run_python(
        "import optimum_heapr, json, sys\n"
        "print(json.dumps({'torch': 'torch' in sys.modules, 'modeling': modeling_modules(),"
        " 'ours': sorted(name for name in sys.modules if name.startswith('optimum_heapr'))}))"
    )
    assert found == {
        "torch": False,
        "modeling": [],
        "ours": ["optimum_heapr", "optimum_heapr.modeling", "optimum_heapr.modeling.auto"],
    }


def test_import_is_fast():
    # Taken in turn, so that a busy moment of the machine hits both; the best of a few is what the code costs.
    transformers, heapr = zip(
        *[(seconds_to_import("transformers"), seconds_to_import("optimum_heapr")) for _ in "123"]
    )
    assert min(heapr) < min(transformers) + 1.0


def test_command_line_is_light():
    """Optimum imports the commands of all plugins at every start."""
    found = run_python(
        "import json, sys\nimport optimum.commands.register.register_heapr\n"
        "heavy = ['torch', 'transformers', 'datasets', 'accelerate', 'evaluate', 'safetensors', 'yaml']\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    assert found == []


def test_the_pruner_costs_no_more_than_the_auto_classes():
    """What takes long is imported by what needs it: `evaluate` and the model code of transformers take seconds each."""
    found = run_python(
        "import json, sys\nfrom transformers import AutoModelForCausalLM\nbefore = set(sys.modules)\n"
        "from optimum_heapr import HeaprPruner\nnew = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps(sorted(new - sys.stdlib_module_names)))"
    )
    assert found == ["optimum_heapr"]


@pytest.fixture
def artefacts(tmp_path):
    statistics = random_statistics()
    statistics.save(tmp_path / "statistics.safetensors")
    plan = PruningPlan.build(statistics, HeaprConfig(ratio=0.3))
    plan.save(tmp_path / "plan.safetensors")
    (tmp_path / "report.json").write_text(json.dumps(build_report(plan, "qwen3_moe")))
    return tmp_path


def heavy_modules(*commands: list[str]) -> list[str]:
    """What commands import that takes long, once they have printed something."""
    return run_python(
        "import contextlib, io, json, sys\nfrom optimum.commands.optimum_cli import main\n"
        f"for command in {[list(map(str, command)) for command in commands]!r}:\n"
        "    sys.argv = ['optimum-cli', 'heapr', *command]\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):\n        main()\n"
        "    assert text.getvalue(), command\n"
        "heavy = ['torch', 'transformers', 'datasets', 'evaluate', 'accelerate', 'huggingface_hub', 'scipy']\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )


def test_what_prints_text_imports_nothing_heavy(artefacts):
    files = [artefacts / name for name in ("statistics.safetensors", "plan.safetensors", "report.json")]
    looking = [["inspect", file, *json] for file in files for json in ([], ["--json"])]
    assert heavy_modules(["--help"], ["prune", "--help"], *looking, ["inspect", files[1], files[1]]) == []


def test_a_plan_is_made_by_torch_alone(artefacts):
    assert heavy_modules(["plan", "-s", artefacts / "statistics.safetensors", "--dry-run"]) == ["torch"]


def test_public_names_are_found_when_asked_for():
    import optimum_heapr

    assert {getattr(optimum_heapr, name).__name__ for name in optimum_heapr.__all__} == set(optimum_heapr.__all__)
    assert set(optimum_heapr.__all__) <= set(dir(optimum_heapr))
    with pytest.raises(AttributeError, match="HeaprPrunner"):
        _ = optimum_heapr.HeaprPrunner


@pytest.mark.parametrize(
    "imports",
    [
        "import optimum_heapr, importlib\nimportlib.reload(optimum_heapr)\n"
        "from transformers import AutoModelForCausalLM, AutoConfig",
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "import optimum_heapr, importlib\nimportlib.reload(optimum_heapr)",
        "import optimum_heapr\nfrom transformers import Qwen3MoeConfig, AutoConfig, AutoModelForCausalLM",
    ],
    # Each asks transformers for another module first, and the one half imported must not be needed.
    ids=["before", "after", "before-configuration"],
)
def test_a_folder_is_read_in_any_import_order(imports, tmp_path):
    """Also where the package is imported twice, as notebooks do; no family is imported before it is used."""
    config = {"model_type": "heapr_qwen3_moe", "expert_widths": {"model.layers.0.mlp.experts": [1, 3]}}
    config |= {"hidden_size": 8, "moe_intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    config |= {"num_key_value_heads": 1, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "vocab_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = (
        imports + "\nimport json, sys\n"
        "early = modeling_modules()\n"
        f"config = AutoConfig.from_pretrained({str(tmp_path)!r})\n"
        "model = AutoModelForCausalLM.from_config(config)\n"
        "finders = [finder for finder in sys.meta_path if 'AutoConfiguration' in type(finder).__name__]\n"
        "print(json.dumps([early, type(config).__name__, type(model).__name__, len(finders),\n"
        "    model.model.layers[0].mlp.experts.widths]))"
    )
    result = processes.run_python(MODELING_MODULES + code)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == [[], "HeaprQwen3MoeConfig", "HeaprQwen3MoeForCausalLM", 0, [1, 3]]
