# Licensed under the Apache License, Version 2.0
"""What was measured once is used again: from a repository, a folder, beside a model, or of a pruned model's base."""

import pytest

from optimum_heapr import AtomicStatistics, HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from optimum_heapr.hub.statistics import load_statistics
from tests.helpers import tiny_model


REUSE = """
import argparse, logging
from pathlib import Path
from huggingface_hub import HfApi
from optimum_heapr import AtomicStatistics, HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from optimum_heapr.cli import HeaprCommand
from tests.helpers import tiny_model, tiny_tokenizer

lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("optimum.heapr").addHandler(handler)

def refusal(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except HeaprError as error:
        return str(error)

for name, seed in (("me/base", 0), ("me/measured", 0), ("me/sibling", 1)):
    tiny_model("qwen3_moe", seed=seed).push_to_hub(name)
tiny_tokenizer().push_to_hub("me/base")
Path("text.jsonl").write_text("".join(json.dumps({"input_ids": list(range(3, 40))}) + "\\n" for _ in range(4)))
options = {"dataset": "text.jsonl", "num_samples": 4, "seq_length": 24}
pruner = HeaprPruner.from_pretrained("me/base", HeaprConfig(**options))
pruner.prune()
pruner.push_to_hub("me/pruned", with_statistics=True)
pruner.push_to_hub("me/bare")
pruner.statistics.save("statistics.safetensors")
for name in ("me/measured", "me/sibling"):
    HfApi().upload_file(path_or_fileobj="statistics.safetensors", path_in_repo="statistics.safetensors", repo_id=name)
expected = PruningPlan.build(pruner.statistics, HeaprConfig(ratio=0.5)).widths

def widths_of(*arguments, **options):
    pruner = HeaprPruner.from_pretrained(*arguments, **options)
    model = pruner.prune(ratio=0.5)  # nothing says what to calibrate on: it cannot but use what was measured
    assert pruner._stages.base.name == (arguments[0] if arguments[0] != "me/pruned" else "me/base")
    return model.config.expert_widths == expected

found = {
    "named": widths_of("me/base", statistics="me/pruned"),
    "beside": widths_of("me/measured"),
    "base": widths_of("me/pruned", revision="main"),
    "warnings": [line for line in lines if "pruned already" in line],
    "new text": HeaprPruner.from_pretrained("me/measured", HeaprConfig(**options)).statistics is None,
    "another model": refusal(HeaprPruner.from_pretrained, "me/sibling", statistics="me/pruned"),
}
lines.clear()
found["another beside"] = HeaprPruner.from_pretrained("me/sibling").statistics is None and lines
found["none there"] = refusal(HeaprPruner.from_pretrained, "me/base", statistics="me/base")
found["no repository"] = refusal(HeaprPruner.from_pretrained, "me/base", statistics="me/missing")
found["pruned, no statistics"] = refusal(HeaprPruner.from_pretrained, "me/bare")
parser = argparse.ArgumentParser()
HeaprCommand(parser.add_subparsers())
for line in ("plan -s me/pruned --ratio 0.5 -o plan.safetensors", "prune -m me/base -s me/pruned --ratio 0.5 -o out"):
    args = parser.parse_args(["heapr", *line.split()])
    args.func(args).run()
found["commands"] = [PruningPlan.load(path).widths == expected for path in ("plan.safetensors", "out")]
answer(found)
"""


@pytest.mark.slow
def test_statistics_of_repositories(hub, run_python):
    found = run_python(REUSE)
    assert found["named"] and found["beside"] and found["base"] and found["new text"]
    assert found["commands"] == [True, True]
    (warning,) = found["warnings"]
    assert "me/pruned was pruned already: loading its base model me/base" in warning
    assert found["another model"].startswith("statistics: made for a model with")
    (ignored,) = found["another beside"]
    assert "me/sibling: statistics.safetensors beside it is not used (statistics: made for a model with" in ignored
    assert found["none there"].startswith(
        "statistics='me/base': is no file, and the repository has no statistics.safetensors"
    )
    assert "statistics='me/missing'" in found["no repository"] and "name a file, or a folder" in found["no repository"]
    assert "was pruned already; start from the unpruned model" in found["pruned, no statistics"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder of a model with its statistics beside it."""
    folder = tmp_path_factory.mktemp("measured")
    model = tiny_model("qwen3_moe")
    model.save_pretrained(folder)
    from datasets import Dataset

    pruner = HeaprPruner(model, config=HeaprConfig(num_samples=4, seq_length=24))
    pruner.calibrate(Dataset.from_dict({"input_ids": [list(range(3, 27))] * 4})).save(
        folder / "statistics.safetensors"
    )
    return folder


def test_statistics_beside_a_model_in_a_folder(measured):
    pruner = HeaprPruner.from_pretrained(measured)
    assert pruner.statistics.num_tokens == 96
    assert pruner.plan(ratio=0.5).ratio == 0.5
    assert HeaprPruner.from_pretrained(measured, HeaprConfig(dataset="new.jsonl")).statistics is None


def test_a_folder_stands_for_its_statistics(measured):
    expected = PruningPlan.build(AtomicStatistics.load(measured / "statistics.safetensors"), HeaprConfig(ratio=0.5))
    pruner = HeaprPruner(tiny_model("qwen3_moe"), config=HeaprConfig(ratio=0.5))
    assert pruner.plan(measured).widths == expected.widths
    statistics = load_statistics(measured)
    assert load_statistics(statistics) is statistics and load_statistics(None) is None


def test_a_pruned_folder_without_a_base_is_refused(measured, tmp_path):
    pruner = HeaprPruner.from_pretrained(measured)
    pruner.prune(ratio=0.5)
    pruner.save_pretrained(tmp_path / "pruned")
    assert (tmp_path / "pruned" / "heapr" / "statistics.safetensors").is_file()
    with pytest.raises(HeaprError, match="was pruned already; start from the unpruned model"):
        HeaprPruner.from_pretrained(tmp_path / "pruned")
    again = HeaprPruner.from_pretrained(measured, statistics=tmp_path / "pruned")
    assert again.plan(ratio=0.25).ratio == 0.25


@pytest.mark.parametrize("name", ["nothing.safetensors", "nothing", "./no/thing", "a/b/c"])
def test_what_is_no_name_on_the_hub_is_looked_for_here_alone(name):
    with pytest.raises(HeaprError, match="no such file; name a file that this package wrote"):
        load_statistics(name)


def test_damaged_statistics_are_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "statistics.safetensors").write_bytes(b"nothing")
    with pytest.raises(HeaprError, match="truncated or not a safetensors file"):
        HeaprPruner.from_pretrained("no/model", statistics=tmp_path)
