# Licensed under the Apache License, Version 2.0
"""A newcomer's walk: the commands of the README on a trained model, pushed, loaded by name elsewhere, evaluated.

The environment is the one that the suite runs in. In continuous integration that is a virtual environment made from nothing by
the README's own command; installing once more from within a test would show nothing else.
"""

import json
import re
import shlex

import pytest

from tests.helpers import repository, shared_folder


pytestmark = pytest.mark.slow

RUN = """
import shlex
from optimum.commands import optimum_cli
from tests.helpers import take_figures_briefly
take_figures_briefly()
for line in sys.argv[1:]:
    sys.argv = shlex.split(line)
    optimum_cli.main()
answer(True)
"""

# The same code with and without the package: options of `from_pretrained` by the name of the model.
LOAD = """
if sys.argv[1] == "package":
    import optimum_heapr
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for name, options in json.loads(sys.argv[2]).items():
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32", **options)
    tokenizer = AutoTokenizer.from_pretrained(name)
    inputs = tokenizer("The function returns", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    found[name] = {
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "width": model.config.moe_intermediate_size,
        "logits": logits[0, -1, :16].tolist(),
        "text": tokenizer.decode(tokens),
    }
answer(found)
"""

EVALUATE = """
import contextlib, io, shlex
from optimum.commands import optimum_cli
sys.argv = shlex.split(sys.argv[1])
with contextlib.redirect_stdout(io.StringIO()) as printed:
    optimum_cli.main()
answer({row["model"]: row["perplexity"] for row in json.loads(printed.getvalue())["perplexity"]})
"""


@pytest.fixture(scope="module")
def shared():
    return shared_folder()


@pytest.fixture(scope="module")
def walked(shared, run_python, tmp_path_factory):
    """Folder with what the README's `prune` commands made of the trained model; it was pushed as well."""
    folder = tmp_path_factory.mktemp("walk")
    readme = (repository() / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^optimum-cli heapr prune -m demo --dataset demo .*-o (\S+)$", readme, re.MULTILINE)
    assert commands == ["pruned-by-cli", "pruned-uniform"]
    model, text = (
        shlex.quote(str(shared / "models" / "moe-a")),
        shlex.quote(str(shared / "data" / "calibration.jsonl")),
    )
    lines = []
    for output in commands:
        (line,) = re.findall(rf"^(optimum-cli heapr prune .*) -o {output}$", readme, re.MULTILINE)
        line = line.replace("-m demo", f"-m {model}").replace("--dataset demo", f"--dataset {text}")
        line = line.replace("--num-samples 16", "--num-samples 8 --eval-samples 2 --dtype float32")  # for time
        lines.append(f"{line} -o {folder / output} --push-to-hub me/{output}")
    run_python(RUN, *lines)
    return folder


def test_everything_is_there(walked, hub):
    for name in ("pruned-by-cli", "pruned-uniform"):
        made = {str(path.relative_to(walked / name)) for path in (walked / name).rglob("*") if path.is_file()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "heapr/plan.safetensors", "README.md"} <= made
        (commit,) = hub.repositories[f"me/{name}"].pushes
        assert set(commit.files) >= made - {"heapr/statistics.safetensors"}
        assert "What was removed" in commit.files["README.md"].content.decode()


def test_loaded_by_name_elsewhere(walked, run_python):
    names = {"me/pruned-by-cli": {}}
    variable = run_python(LOAD, "package", json.dumps(names))["me/pruned-by-cli"]
    assert variable["class"] == "HeaprQwen3MoeForCausalLM" and variable["text"].startswith("The function returns")
    names = {"me/pruned-by-cli": {"trust_remote_code": True}, "me/pruned-uniform": {}}
    alone = run_python(LOAD, "alone", json.dumps(names), package=False)
    assert alone["me/pruned-by-cli"] == variable
    uniform = alone["me/pruned-uniform"]  # nothing but transformers
    assert uniform["class"] == "Qwen3MoeForCausalLM" and uniform["width"] == 80  # the multiple of 16 above 72 of 96
    assert variable["parameters"] < uniform["parameters"] < 12_900_000


def test_evaluated_side_by_side(walked, shared, run_python):
    base, text = shared / "models" / "moe-a", shared / "data" / "eval_docs.jsonl"
    models = [str(base), "me/pruned-by-cli", "me/pruned-uniform"]
    command = ["optimum-cli", "heapr", "evaluate", "-m", *models, "--dataset", str(text), "--json"]
    options = ["--seq-length", "256", "--num-samples", "6", "--dtype", "float32"]
    before, pruned, uniform = map(run_python(EVALUATE, shlex.join([*command, *options])).get, models)
    # A quarter of the atomic experts goes for almost nothing where each expert keeps what it needs.
    assert 0.98 * before < pruned < 1.03 * before
    assert 0.98 * before < uniform < 1.1 * before


def test_the_report_opens_without_a_network(walked):
    page = (walked / "pruned-by-cli" / "heapr" / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//[^"']+\.(?:js|css|png|svg|woff2?)["']""", page)
    assert "@import" not in page and "fetch(" not in page
