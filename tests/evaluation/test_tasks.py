# Licensed under the Apache License, Version 2.0
"""lm-evaluation-harness on a task written here, offline: through this package, and by itself on a pruned checkpoint."""

import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner
from optimum_heapr.evaluation.tasks import TASK_PRESETS, evaluate_tasks
from tests.helpers import tiny_model, tiny_tokenizer
from tests.processes import run_python


pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'optimum-heapr[eval]'")

ROWS = [
    ("The quick brown fox jumps over the lazy", [" dog", " expert", " 42"], 0),
    ("A router sends every token to a few", [" foxes", " experts"], 1),
    ("Whoever measures twice cuts", [" never", " once", " a token"], 1),
    ("An expert is a sum of atomic", [" years", " experts"], 1),
    ("Numbers such as 0, 1, 2, 3,", [" 42", " dog"], 0),
]
TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
GENERATION = """task: tiny_generation
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: "nothing"
generation_kwargs:
  until: ["."]
  max_gen_toks: 5
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    rows = [{"question": question, "choices": choices, "label": label} for question, choices, label in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(TASK.format(data=data))
    (folder / "generation.yaml").write_text(GENERATION.format(data=data))
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    pruner = HeaprPruner(tiny_model(), tiny_tokenizer(), HeaprConfig(num_samples=4, seq_length=16, ratio=0.3))
    pruner.calibrate(Dataset.from_dict({"text": [question for question, _, _ in ROWS * 6]}))
    pruner.prune()
    return pruner.save_pretrained(tmp_path_factory.mktemp("models") / "pruned"), pruner.model


@torch.no_grad()
def accuracy(model) -> float:
    """Share of rows whose answer is the most probable of its choices."""
    tokenizer, right = tiny_tokenizer(), 0
    for question, choices, label in ROWS:
        scores = []
        for choice in choices:
            given, ids = tokenizer(question)["input_ids"], tokenizer(question + choice)["input_ids"]
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(given), len(ids))))
        right += scores.index(max(scores)) == label
    return right / len(ROWS)


def test_a_local_task_gives_the_accuracy_counted_by_hand(folder, pruned):
    for model in (tiny_model(), pruned[1]):
        (row,) = evaluate_tasks(model, tiny_tokenizer(), ["tiny_choice"], folder)
        assert (row["task"], row["metric"], row["documents"]) == ("tiny_choice", "acc", 5)
        assert row["value"] == pytest.approx(accuracy(model))
        share = row["value"]
        assert row["standard_error"] == pytest.approx((share * (1 - share) / 4) ** 0.5)


def test_options_of_the_harness(folder, pruned):
    (row,) = evaluate_tasks(pruned[1], tiny_tokenizer(), ["tiny_choice"], folder, limit=2, batch_size=2, num_fewshot=0)
    assert row["documents"] == 2 and row["num_fewshot"] == 0
    (row,) = evaluate_tasks(pruned[1], tiny_tokenizer(), ["tiny_generation"], folder)
    assert row["metric"] == "exact_match" and row["value"] == 0.0


def test_presets_name_tasks_that_the_harness_has():
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    # Their folders alone: reading all of them takes long.
    root = Path(lm_eval.tasks.__file__).parent
    folders = [
        root / name for name in ("openbookqa", "arc", "winogrande", "hellaswag", "piqa", "mathqa", "gsm8k", "ifeval")
    ]
    known = TaskManager(include_path=folders, include_defaults=False).all_tasks
    assert len(TASK_PRESETS["paper"]) == 7
    assert {task for preset in TASK_PRESETS.values() for task in preset} <= set(known)


def test_what_cannot_be_run_is_refused(folder):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for problem, names, options in (
        ("no such folder", ["tiny_choice"], {"include_path": folder / "missing"}),
        ("limit=0: must be at least 1", ["tiny_choice"], {"include_path": folder, "limit": 0}),
        ("the tokenizer has none", ["tiny_choice"], {"include_path": folder, "chat_template": True}),
    ):
        with pytest.raises(HeaprError, match=problem):
            evaluate_tasks(model, tokenizer, names, **options)
    with pytest.raises(HeaprError, match="no tokenizer"):
        evaluate_tasks(model, None, ["tiny_choice"], folder)
    (folder / "rows.jsonl").rename(folder / "gone.jsonl")
    try:
        with pytest.raises(HeaprError, match=r"tasks=\['tiny_generation'\]: cannot be run"):
            evaluate_tasks(model, tokenizer, ["tiny_generation"], folder)
    finally:
        (folder / "gone.jsonl").rename(folder / "rows.jsonl")


PLAIN = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "optimum_heapr":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import lm_eval
from lm_eval.tasks import TaskManager
found = lm_eval.simple_evaluate(
    model="hf",
    model_args={"pretrained": sys.argv[1], "trust_remote_code": True, "dtype": "float32"},
    tasks=["tiny_choice"],
    task_manager=TaskManager(include_path=sys.argv[2], include_defaults=False),
    device="cpu",
    bootstrap_iters=0,
)
print("FOUND", found["results"]["tiny_choice"]["acc,none"])
"""


@pytest.mark.slow
def test_the_harness_alone_runs_a_pruned_checkpoint(folder, pruned, tmp_path):
    """As `lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True`, without this package."""
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    done = run_python(PLAIN, pruned[0], folder, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.rpartition("FOUND ")[2]) == pytest.approx(accuracy(pruned[1]))


def test_experts_of_any_width_are_evaluated(folder):
    """`grouped_mm` of transformers takes no rows of 9 numbers."""
    model = tiny_model(moe_intermediate_size=9)
    for task in ("tiny_choice", "tiny_generation"):
        (row,) = evaluate_tasks(model, tiny_tokenizer(), [task], folder)
        assert row["documents"] == 5
