# Licensed under the Apache License, Version 2.0
"""A calibration text that is not there, or holds nothing to read."""

import json

from optimum_heapr import PruningPlan
from tests.cli.errors.table import copied_model, lines, mistake, prune
from tests.helpers import SENTENCES


@mistake
def no_dataset(inputs, here):
    return prune(inputs, here), ["--dataset", "name the text"]


@mistake(early=True)
def missing_dataset(inputs, here):
    return prune(inputs, here, "--dataset", here / "nowhere.jsonl"), [str(here / "nowhere.jsonl"), "no such file"]


@mistake
def missing_dataset_on_the_hub(inputs, here):
    return prune(inputs, here, "--dataset", "nobody/nothing"), ["nobody/nothing"]


@mistake(early=True)
def calibrate_without_a_dataset(inputs, here):
    return ["calibrate", "-m", inputs.model, "-o", here / "out"], ["--dataset", "name the text"]


@mistake(early=True)
def missing_text_to_measure_on(inputs, here):
    flags = [*inputs.calibration, "--eval-dataset", here / "nowhere.jsonl"]
    return prune(inputs, here, *flags), [str(here / "nowhere.jsonl"), "no such file"]


@mistake
def dataset_of_an_unknown_kind(inputs, here):
    path = here / "text.pdf"
    path.write_bytes(b"%PDF")
    return prune(inputs, here, "--dataset", path), [str(path), ".jsonl"]


@mistake
def dataset_that_cannot_be_parsed(inputs, here):
    path = here / "text.jsonl"
    path.write_text("{not json\n")
    return prune(inputs, here, "--dataset", path), [str(path), "cannot be loaded"]


@mistake(early=True)
def empty_dataset(inputs, here):
    path = here / "empty.jsonl"
    path.write_text("")
    return prune(inputs, here, "--dataset", path), [str(path)]


@mistake
def dataset_of_empty_texts(inputs, here):
    path = lines(here / "empty.jsonl", [{"text": ""}, {"text": ""}])
    return prune(inputs, here, "--dataset", path), [str(path), "two"]


@mistake
def samples_of_one_token(inputs, here):
    path = lines(here / "short.jsonl", [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    return prune(inputs, here, "--dataset", path), [str(path), "sample 1 has 1 tokens", "at least two"]


@mistake(early=True)
def missing_text_column(inputs, here):
    flags = ["--dataset", inputs.text, "--text-column", "body"]
    return prune(inputs, here, *flags), ["--text-column body", "text", "name one of them"]


@mistake
def messages_without_a_chat_template(inputs, here):
    path = lines(here / "chat.jsonl", [{"messages": [{"role": "user", "content": SENTENCES[0]}]}])
    return prune(inputs, here, "--dataset", path), [str(path), "chat template"]


@mistake
def text_without_a_tokenizer(inputs, here):
    model = copied_model(inputs, here / "mute", remove="tokenizer*")
    return prune(inputs, here, *inputs.calibration, model=model), ["no tokenizer"]


# Texts that hold what cannot be read: both commands that read them say so.


def rows(*values) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


DIALOGUE = [{"role": "user", "content": "Hello"}]


# What is wrong: (name of the file, its content, words of the line)
TEXTS = {
    "JSON lines in Latin-1": (
        "x.jsonl",
        '{"text": "café"}\n'.encode("latin-1"),
        ["it is not UTF-8 text", "save it as UTF-8"],
    ),
    "prose in Latin-1": ("x.txt", "café\n".encode("latin-1"), ["it is not UTF-8 text", "save it as UTF-8"]),
    "a number for text": ("x.jsonl", rows({"text": 3}), ["row 0", "'text' holds int, not text"]),
    "a dialogue as a string": (
        "x.jsonl",
        rows({"text": json.dumps(DIALOGUE)}),
        ["row 0", "as a JSON string", "'messages'"],
    ),
    "a dialogue without a template": ("x.jsonl", rows({"conversations": DIALOGUE}), ["no chat template"]),
    "no token ids": ("x.jsonl", rows({"input_ids": None}), ["row 0", "input_ids=null", "one list of token ids"]),
    "nested token ids": ("x.jsonl", rows({"input_ids": [[1, 2], [3]]}), ["row 0", "input_ids=[[1, 2]", "one list"]),
    "fractions for token ids": ("x.jsonl", rows({"input_ids": [1.5, 2.5]}), ["row 0", "input_ids=[1.5", "one list"]),
    "token ids beyond the vocabulary": ("x.jsonl", rows({"input_ids": [1, 99_999]}), ["sample 0", "99999"]),
    "preferences": (
        "x.jsonl",
        rows({"prompt": "a", "chosen": "b", "rejected": "c"}),
        ["prompt, chosen, rejected; name one"],
    ),
    "prompts alone": ("x.jsonl", rows({"prompt": "a"}), ["columns prompt; name one", "prompt and completion"]),
    "messages completed by text": (
        "x.jsonl",
        rows({"prompt": DIALOGUE, "completion": "b"}),
        ["row 0", "'completion' holds str; it takes lists of messages"],
    ),
    "messages in two columns without a template": (
        "x.jsonl",
        rows({"prompt": DIALOGUE, "completion": DIALOGUE}),
        ["row 0", "holds messages but the tokenizer has no chat template"],
    ),
}


def _read(command: str, file: str, content: bytes, named: list[str]):
    def made(inputs, here):
        (here / file).write_bytes(content)
        flags = ["-m", inputs.model, "-o", here / "out", "--dataset", file, "--seq-length", 8, "--num-samples", 1]
        return [command, *flags], [file, *named]

    return made


for kind, (file, content, named) in TEXTS.items():
    for command in ("calibrate", "prune"):
        mistake(name=f"{command}: {kind}")(_read(command, file, content, named))


@mistake(early=True)
def a_plan_over_blocks_without_text(inputs, here):
    plan = PruningPlan.load(inputs.plan)
    plan.config = plan.config.replace(dataset=None, compensate=True, compensation_scope="block")
    plan.save(here / "plan")
    named = ["--dataset", "compensates over blocks", "9 samples, 216 tokens", "--num-samples and --seq-length"]
    return ["apply", "-m", inputs.model, "-p", here / "plan", "-o", here / "out"], named
