# Licensed under the Apache License, Version 2.0
"""Pruned models go to a Hub in one commit and come back by name, exactly, in a process that knows nothing else."""

import pytest


FAMILIES = ("qwen3_moe", "qwen2_moe", "deepseek", "gpt_oss")
OPTIONS = (*FAMILIES, "uniform")

PUSH = """
from pathlib import Path
from huggingface_hub import hf_hub_download
from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.text.samples import CalibrationData
from tests.helpers import tiny_tokenizer
from tests.modeling.test_families import make_model
from tests.surgery.stock_models import logits_of, wide_model
from datasets import Dataset

def pruner_of(family, ratio=0.25):
    model = wide_model("qwen3_moe") if family == "uniform" else make_model(family)
    model.generation_config.update(top_k=7, do_sample=True)
    layout = "uniform" if family == "uniform" else "variable"
    config = HeaprConfig(ratio=ratio, layout=layout, num_samples=4, seq_length=24)
    pruner = HeaprPruner(model, tiny_tokenizer(), config)
    generator = torch.Generator().manual_seed(1)
    pruner.calibrate(Dataset.from_dict({"input_ids": torch.randint(3, 96, (4, 24), generator=generator).tolist()}))
    pruner.prune()
    return pruner
"""

PUSH_ALL = (
    PUSH
    + """
folder = Path(sys.argv[1])
urls = {}
for family in sys.argv[2:]:
    pruner = pruner_of(family)
    urls[family] = str(pruner.push_to_hub(f"me/tiny-{family}", private=family == "gpt_oss", max_shard_size="30KB"))
    pruner.model.push_to_hub(f"me/alone-{family}")
    torch.save(logits_of(pruner.model), folder / f"{family}.pt")
pruner = pruner_of("qwen3_moe")
pruner.push_to_hub("me/tiny-qwen3_moe", revision="small", with_statistics=True, commit_message="One file")
answer(urls)
"""
)

LOAD_ALL = """
from pathlib import Path
folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
if not options:
    import optimum_heapr
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
ids = torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(1))
found = {}
for name in sys.argv[3:]:
    model, info = AutoModelForCausalLM.from_pretrained(f"me/{name}", output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        same = torch.equal(model.eval()(input_ids=ids).logits, torch.load(folder / (name.split("-")[1] + ".pt")))
    found[name] = [same, type(model).__name__, model.generation_config.top_k]
assert AutoTokenizer.from_pretrained("me/tiny-qwen3_moe")("An expert").input_ids
assert "optimum_heapr" in sys.modules or options
answer(found)
"""


@pytest.fixture(scope="module")
def pushed(hub, run_python, tmp_path_factory):
    """Folder of the logits of models that were pushed, and the addresses of the commits."""
    folder = tmp_path_factory.mktemp("logits")
    return folder, run_python(PUSH_ALL, folder, *OPTIONS)


NAMES = [f"{way}-{family}" for family in OPTIONS for way in ("tiny", "alone")]


@pytest.mark.slow
@pytest.mark.parametrize("package", [True, False], ids=["package", "remote code"])
def test_loaded_by_name_in_a_fresh_process(package, pushed, run_python):
    options = "{}" if package else '{"trust_remote_code": true}'
    found = run_python(LOAD_ALL, pushed[0], options, *NAMES, package=package)
    assert set(found) == set(NAMES)
    for name, (same, class_name, top_k) in found.items():
        assert same, name
        assert class_name.startswith("Qwen3Moe" if "uniform" in name else "Heapr"), name
        assert top_k == 7


@pytest.mark.slow
def test_everything_comes_in_one_commit(pushed, hub):
    for family in OPTIONS:
        repository = hub.repositories[f"me/tiny-{family}"]
        (commit,) = repository.pushes
        assert pushed[1][family] == f"{hub.url}/me/tiny-{family}/commit/{commit.sha}"
        files = set(commit.files)
        assert {
            "README.md",
            "config.json",
            "generation_config.json",
            "heapr/heapr_config.json",
            "heapr/plan.safetensors",
        } <= files
        assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"} <= files
        assert ("modeling_heapr.py" in files) == (family != "uniform"), family
        assert not [name for name in files if "statistics" in name]
        assert len([name for name in files if name.startswith("model-")]) > 1
        assert f'from_pretrained("me/tiny-{family}"' in commit.files["README.md"].content.decode()
        assert all(file.is_large == name.endswith(".safetensors") for name, file in commit.files.items())
        assert repository.private == (family == "gpt_oss")
    assert any(name.endswith(".py") for name in hub.repositories["me/alone-deepseek"].pushes[0].files)


REVISION = """
from transformers import AutoConfig, AutoModelForCausalLM
from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner
from optimum_heapr.calibration.statistics import AtomicStatistics
from huggingface_hub import hf_hub_download
small = {"revision": "small", "token": "hf_writer"}
AutoModelForCausalLM.from_pretrained("me/tiny-qwen3_moe", **small)
AtomicStatistics.load(hf_hub_download("me/tiny-qwen3_moe", "heapr/statistics.safetensors", **small))
try:
    HeaprPruner.from_pretrained("me/tiny-qwen3_moe", **small)
except HeaprError as error:
    refusal = str(error)
private = HeaprConfig.from_pretrained("me/tiny-gpt_oss", token="hf_writer")
answer([HeaprConfig.from_pretrained("me/tiny-qwen3_moe", **small).to_dict(), private.ratio, refusal])
"""


@pytest.mark.slow
def test_revision_and_token(pushed, hub, run_python):
    repository = hub.repositories["me/tiny-qwen3_moe"]
    (*_, commit) = repository.branches["small"]
    assert commit.message == "One file" and len(repository.branches["small"]) == 3 and len(repository.pushes) == 1
    assert {"model.safetensors", "heapr/statistics.safetensors"} <= set(commit.files)
    # The shards of the model that was there before are gone: nothing could mix them up with the new one.
    assert not [name for name in commit.files if name.startswith(("model-", "model.safetensors.index"))]
    config, private_ratio, refusal = run_python(REVISION, token=None)
    assert config["ratio"] == 0.25 == private_ratio and config["num_samples"] == 4
    assert "pruned already" in refusal


BASE = (
    PUSH
    + """
make_model("qwen3_moe").push_to_hub("me/base")
tiny_tokenizer().push_to_hub("me/base")
from huggingface_hub import HfApi, ModelCard
card = "---\\nlicense: other\\nlicense_name: tiny-licence\\nlicense_link: LICENSE\\n---\\nBase."
HfApi().upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="me/base")
Path("text.jsonl").write_text("".join(json.dumps({"input_ids": list(range(3, 40))}) + "\\n" for _ in range(4)))
from optimum_heapr.checkpoints.saving import apply_streaming
config = HeaprConfig(ratio=0.25, dataset="text.jsonl", num_samples=4, seq_length=24)
pruner = HeaprPruner.from_pretrained("me/base", config, token="hf_writer")
pruner.prune()
pruner.save_pretrained("memory", push_to_hub=True, repo_id="me/memory", private=True)
apply_streaming("me/base", pruner.applied_plan, "stream", token="hf_writer")
import argparse
from optimum_heapr.cli import HeaprCommand
parser = argparse.ArgumentParser()
HeaprCommand(parser.add_subparsers())
def run(line):
    args = parser.parse_args(["heapr", *line.split()])
    args.func(args).run()
run("apply -m me/base -p memory -o cli --push-to-hub me/cli --private")
run("prune -m me/base --dataset text.jsonl --num-samples 4 --seq-length 24 -o pruned --push-to-hub me/pruned")
card = ModelCard.load("me/memory")
answer([card.data.to_dict(), Path("memory/README.md").read_text(), Path("stream/README.md").read_text()])
"""
)


@pytest.mark.slow
def test_a_base_model_on_the_hub(hub, run_python):
    """Its card gives the licence; every way to prune and push gives the same card."""
    metadata, memory, stream = run_python(BASE)
    assert metadata["base_model"] == "me/base"
    assert metadata["license"] == "other" and metadata["license_name"] == "tiny-licence"
    assert metadata["license_link"] == "https://huggingface.co/me/base/blob/main/LICENSE"
    assert "datasets" not in metadata
    assert memory == stream and hub.repositories["me/base"].branches["main"][-1].sha in memory
    cards = []
    for name in ("me/memory", "me/cli", "me/pruned"):
        (commit,) = hub.repositories[name].pushes
        cards.append(commit.files["README.md"].content.decode().replace(name, "path/to/this/model"))
        assert hub.repositories[name].private == (name != "me/pruned")
    assert cards == [memory] * 3


REFUSALS = (
    PUSH
    + """
from optimum_heapr.hub.push import check_login
from optimum_heapr import HeaprError
def refusal(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except HeaprError as error:
        return str(error)
pruner = pruner_of("qwen3_moe")
token = os.environ.pop("HF_TOKEN")
answer({
    "anonymous": refusal(pruner.push_to_hub, "me/refused"),
    "login": refusal(check_login, "me/refused"),
    **(os.environ.update(HF_TOKEN=token) or {}),
    "unknown token": refusal(pruner.push_to_hub, "me/refused", token="hf_wrong"),
    "read token": refusal(pruner.push_to_hub, "me/refused", token="hf_reader"),
    "another's": refusal(pruner.push_to_hub, "somebody/refused"),
    "malformed": refusal(pruner.push_to_hub, "a/b/c"),
    "conflict": refusal(pruner.push_to_hub, "me/busy"),
    "hidden": refusal(pruner.push_to_hub, "me/hidden"),
    "broken": refusal(pruner_of("qwen3_moe", 0.4).push_to_hub, "me/broken"),
    "missing": refusal(HeaprPruner.from_pretrained, "me/missing"),
    "missing revision": refusal(HeaprPruner.from_pretrained, "me/busy", revision="nowhere"),
    "not pruned": refusal(HeaprConfig.from_pretrained, "me/missing"),
})
"""
)


@pytest.fixture(scope="module")
def refusals(hub, run_python):
    hub.answers = {
        "POST /api/models/me/busy/commit/main": 409,
        "POST /api/models/me/hidden/preupload/main": 404,
    }
    # Of the last push the shards arrive, and the connection breaks off when the plan comes.
    hub.break_uploads = lambda content: "me/broken" in hub.repositories and content.count(b"heapr_plan") > 0
    hub.large.clear()
    yield run_python(REFUSALS)
    hub.answers, hub.break_uploads = {}, lambda content: False


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, name, step",
    [
        ("anonymous", "me/refused", "log in with `hf auth login`, or pass token"),
        ("login", "me/refused", "log in with `hf auth login`, or pass token"),
        ("unknown token", "me/refused", "log in with `hf auth login`, or pass token"),
        ("read token", "me/refused", "pass a token with write access, or name a repository of your own"),
        ("another's", "somebody/refused", "pass a token with write access, or name a repository of your own"),
        ("malformed", "a/b/c", "use NAME or OWNER/NAME"),
        ("conflict", "me/busy", "somebody else changed it in the meantime; push again"),
        ("hidden", "me/hidden", "check the name and the token"),
        ("broken", "me/broken", "the upload broke off"),
        ("missing", "me/missing", "name a folder or a repository on the Hub"),
        ("missing revision", "me/busy", "name a folder or a repository on the Hub"),
        ("not pruned", "me/missing", "has no config.json that can be read"),
    ],
)
def test_refusals_name_the_repository_and_the_next_step(case, name, step, refusals):
    message = refusals[case]
    assert message is not None and "\n" not in message
    assert repr(name) in message and step in message


@pytest.mark.slow
def test_a_refused_or_interrupted_push_commits_nothing(refusals, hub):
    for name in ("me/busy", "me/hidden", "me/broken"):
        assert hub.repositories[name].pushes == []
    assert "me/refused" not in hub.repositories and "somebody/refused" not in hub.repositories
