# Licensed under the Apache License, Version 2.0
"""Every mistake that can be foreseen: one line on stderr that names the value, status 2, and nothing left behind."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file

from optimum_heapr import PruningPlan
from tests.cli.conftest import CALIBRATION_FLAGS, listing
from tests.helpers import SENTENCES, tiny_model, tiny_tokenizer
from tests.processes import start_python


def lines(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def saved(path, model_type: str, **changes):
    tiny_model(model_type, **changes).save_pretrained(path)
    tiny_tokenizer(path)
    return path


def copied_model(inputs, path, remove: str = ""):
    return shutil.copytree(inputs.model, path, ignore=shutil.ignore_patterns(remove) if remove else None)


def truncated(source, path):
    content = source.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def foreign(path):
    save_file({"weight": torch.zeros(3)}, path)
    return path


# Each mistake: the command line, made in an empty folder, and what the message must name: value, range, next step.
MISTAKES: dict[str, Callable] = {}


def mistake(function):
    MISTAKES[function.__name__] = function
    return function


def prune(inputs, here, *flags, model=None, output=None):
    return ["prune", "-m", model or inputs.model, "-o", output or here / "out", *flags]


@mistake
def prune_a_dense_model(inputs, here):
    model = saved(here / "dense", "llama")
    return prune(inputs, here, *inputs.calibration, model=model), [str(model), "'llama'", "Mixture-of-Experts"]


@mistake
def calibrate_a_dense_model(inputs, here):
    model = saved(here / "dense", "llama")
    flags = ["-m", model, "-o", here / "statistics", *inputs.calibration]
    return ["calibrate", *flags], [str(model), "'llama'", "Mixture-of-Experts"]


@mistake
def unknown_family(inputs, here):
    model = here / "unknown"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    return prune(inputs, here, *inputs.calibration, model=model), [str(model), "nonsense"]


@mistake
def a_model_without_a_language_head(inputs, here):
    model = here / "vision"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "vit"}))
    return prune(inputs, here, *inputs.calibration, model=model), [str(model), "ViTConfig"]


@mistake
def broken_config(inputs, here):
    model = copied_model(inputs, here / "broken")
    (model / "config.json").write_text('{"model_type": "qwen3_moe", "hidden_size": "many"}')
    return prune(inputs, here, *inputs.calibration, model=model), [str(model), "hidden_size"]


@mistake
def already_pruned(inputs, here):
    return prune(inputs, here, *inputs.calibration, model=inputs.pruned), [str(inputs.pruned), "pruned already"]


@mistake
def calibrate_already_pruned(inputs, here):
    flags = ["-m", inputs.pruned, "-o", here / "statistics", *inputs.calibration]
    return ["calibrate", *flags], [str(inputs.pruned), "pruned already", "unpruned"]


@mistake
def missing_model(inputs, here):
    named = [str(here / "nowhere"), "no such folder", "name a folder"]
    return prune(inputs, here, *inputs.calibration, model=here / "nowhere"), named


@mistake
def missing_model_on_the_hub(inputs, here):
    return prune(inputs, here, *inputs.calibration, model="nobody/nothing"), ["nobody/nothing", "name a folder"]


@mistake
def model_without_weights(inputs, here):
    model = copied_model(inputs, here / "empty", remove="*.safetensors")
    return prune(inputs, here, *inputs.calibration, model=model), [str(model), "model.safetensors"]


@mistake
def model_with_truncated_weights(inputs, here):
    model = copied_model(inputs, here / "torn", remove="*.safetensors")
    truncated(inputs.model / "model.safetensors", model / "model.safetensors")
    return prune(inputs, here, *inputs.calibration, model=model), [str(model), "cannot be loaded"]


@mistake
def unknown_dtype(inputs, here):
    return prune(inputs, here, *inputs.calibration, "--dtype", "float7"), ["float7"]


@mistake
def no_dataset(inputs, here):
    return prune(inputs, here), ["dataset=None", "name the text"]


@mistake
def missing_dataset(inputs, here):
    return prune(inputs, here, "--dataset", here / "nowhere.jsonl"), [str(here / "nowhere.jsonl"), "no such file"]


@mistake
def missing_dataset_on_the_hub(inputs, here):
    return prune(inputs, here, "--dataset", "nobody/nothing"), ["nobody/nothing"]


@mistake
def calibrate_without_a_dataset(inputs, here):
    return ["calibrate", "-m", inputs.model, "-o", here / "out"], ["dataset=None", "name the text"]


@mistake
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


@mistake
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


@mistake
def missing_text_column(inputs, here):
    flags = ["--dataset", inputs.text, "--text-column", "body"]
    return prune(inputs, here, *flags), ["text_column='body'", "text", "name one of them"]


@mistake
def messages_without_a_chat_template(inputs, here):
    path = lines(here / "chat.jsonl", [{"messages": [{"role": "user", "content": SENTENCES[0]}]}])
    return prune(inputs, here, "--dataset", path), [str(path), "chat template"]


@mistake
def text_without_a_tokenizer(inputs, here):
    model = copied_model(inputs, here / "mute", remove="tokenizer*")
    return prune(inputs, here, *inputs.calibration, model=model), ["no tokenizer"]


@mistake
def statistics_of_another_model(inputs, here):
    model = saved(here / "sibling", "qwen3_moe", seed=1)
    flags = ["-s", inputs.statistics]
    return prune(inputs, here, *flags, model=model), ["statistics", "made for a model with", "calibrate this model"]


@mistake
def statistics_of_another_family(inputs, here):
    model = saved(here / "other", "mixtral")
    return prune(inputs, here, "-s", inputs.statistics, model=model), ['"qwen3_moe"', '"mixtral"']


@mistake
def missing_statistics(inputs, here):
    return prune(inputs, here, "-s", here / "nowhere"), [str(here / "nowhere"), "no such file"]


@mistake
def plan_from_truncated_statistics(inputs, here):
    path = truncated(inputs.statistics, here / "torn.safetensors")
    return ["plan", "-s", path, "-o", here / "plan"], [str(path), "truncated", "make it again"]


@mistake
def plan_from_foreign_safetensors(inputs, here):
    path = foreign(here / "foreign.safetensors")
    return ["plan", "-s", path, "-o", here / "plan"], [str(path), "'unmarked'", "heapr_statistics"]


@mistake
def plan_from_a_plan(inputs, here):
    return ["plan", "-s", inputs.plan, "-o", here / "plan"], [str(inputs.plan), "heapr_plan", "heapr_statistics"]


@mistake
def plan_from_text(inputs, here):
    return ["plan", "-s", inputs.text, "-o", here / "plan"], [str(inputs.text), "not a safetensors file"]


@mistake
def apply_statistics_as_a_plan(inputs, here):
    flags = ["-m", inputs.model, "-p", inputs.statistics, "-o", here / "out"]
    return ["apply", *flags], [str(inputs.statistics), "heapr_statistics", "heapr_plan"]


@mistake
def apply_a_truncated_plan(inputs, here):
    path = truncated(inputs.plan, here / "torn.safetensors")
    return ["apply", "-m", inputs.model, "-p", path, "-o", here / "out"], [str(path), "truncated"]


@mistake
def apply_a_plan_of_other_widths(inputs, here):
    plan = PruningPlan.load(inputs.plan)
    path = here / "wide.safetensors"
    dataclasses.replace(plan, original_width=dict.fromkeys(plan.kept, 40)).save(path)
    return ["apply", "-m", inputs.model, "-p", path, "-o", here / "out"], ["(6, 40)", "(6, 12)"]


@mistake
def apply_a_plan_with_indices_beyond_the_width(inputs, here):
    plan = PruningPlan.load(inputs.plan)
    first = next(iter(plan.kept))
    plan.kept[first][2] = torch.tensor([0, 12])
    plan.save(here / "wide.safetensors")
    flags = ["-m", inputs.model, "-p", here / "wide.safetensors", "-o", here / "out"]
    return ["apply", *flags], [first, "expert 2", "[0, 12)"]


@mistake
def apply_a_plan_with_too_few_indices(inputs, here):
    from safetensors import safe_open

    with safe_open(inputs.plan, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    name = next(name for name in tensors if name.endswith("kept_indices"))
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, here / "plan.safetensors", metadata)
    flags = ["-m", inputs.model, "-p", here / "plan.safetensors", "-o", here / "out"]
    return ["apply", *flags], [str(here / "plan.safetensors"), "do not fit"]


@mistake
def apply_a_plan_of_another_model(inputs, here):
    model = saved(here / "deeper", "qwen3_moe", num_hidden_layers=3)
    flags = ["-m", model, "-p", inputs.plan, "-o", here / "out"]
    return ["apply", *flags], ["model.layers.2.mlp.experts", "None", "(6, 12)"]


@mistake
def apply_in_memory_a_plan_of_a_sibling(inputs, here):
    model = saved(here / "sibling", "qwen3_moe", seed=1)
    flags = ["-m", model, "-p", inputs.plan, "-o", here / "out", "--packed"]
    return ["apply", *flags], ["plan", "made for a model with"]


@mistake
def apply_a_plan_of_a_sibling(inputs, here):
    model = saved(here / "sibling", "qwen3_moe", seed=1)
    flags = ["-m", model, "-p", inputs.plan, "-o", here / "out"]
    return ["apply", *flags], ["plan", "made for a model with"]


@mistake
def output_that_cannot_be_made(inputs, here):
    output = "/proc/optimum-heapr/out"
    return prune(inputs, here, *inputs.calibration, output=output), [output, "name a folder you own"]


@mistake
def statistics_that_cannot_be_made(inputs, here):
    output = "/proc/optimum-heapr/statistics"
    flags = ["-m", inputs.model, "-o", output, *inputs.calibration]
    return ["calibrate", *flags], [output, "name a folder you own"]


@mistake
def output_below_a_file(inputs, here):
    (here / "file").write_text("")
    output = here / "file" / "out"
    return prune(inputs, here, *inputs.calibration, output=output), [str(output)]


@mistake
def output_is_a_file(inputs, here):
    (here / "out").write_text("mine")
    return prune(inputs, here, *inputs.calibration), [str(here / "out"), "is a file"]


@mistake
def unknown_shard_size(inputs, here):
    flags = [*inputs.calibration, "--max-shard-size", "5XB"]
    return prune(inputs, here, *flags), ["max_shard_size='5XB'", "12GB"]


@mistake
def unknown_shard_size_of_apply(inputs, here):
    flags = ["-m", inputs.model, "-p", inputs.plan, "-o", here / "out", "--max-shard-size", "0"]
    return ["apply", *flags], ["max_shard_size='0'", "12GB"]


@mistake
def output_is_not_empty(inputs, here):
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    return prune(inputs, here, *inputs.calibration), [str(here / "out"), "not empty", "'notes.txt'", "name another"]


@mistake
def output_is_no_output(inputs, here):
    (here / "out" / ".git").mkdir(parents=True)
    (here / "out" / ".git" / "HEAD").write_text("mine")
    flags = [*inputs.calibration, "--overwrite"]
    return prune(inputs, here, *flags), [str(here / "out"), "'.git/HEAD'", "no record", "name another"]


@mistake
def output_is_the_current_folder_of_something_else(inputs, here):
    (here / "paper.tex").write_text("mine")
    flags = ["-m", inputs.model, "-p", inputs.plan, "-o", ".", "--overwrite"]
    return ["apply", *flags], ["output='.'", "'paper.tex'", "no record"]


@mistake
def output_of_calibrate_is_no_artefact(inputs, here):
    (here / "paper.tex").write_text("mine")
    flags = ["-m", inputs.model, "-o", here / "paper.tex", "--overwrite", *inputs.calibration]
    return ["calibrate", *flags], [str(here / "paper.tex"), "is not a statistics file or plan", "name another"]


@mistake
def output_of_plan_holds_weights(inputs, here):
    weights = shutil.copy(inputs.model / "model.safetensors", here / "model.safetensors")
    return ["plan", "-s", inputs.statistics, "-o", weights, "--overwrite"], [str(weights), "is not a statistics file"]


@mistake
def kept_statistics_are_no_artefact(inputs, here):
    weights = shutil.copy(inputs.model / "model.safetensors", here / "model.safetensors")
    flags = [*inputs.calibration, "--save-statistics", weights, "--overwrite"]
    return prune(inputs, here, *flags), [str(weights), "is not a statistics file or plan", "name another"]


@mistake
def output_is_the_model(inputs, here):
    model = copied_model(inputs, here / "model")
    flags = [*inputs.calibration, "--overwrite"]
    return prune(inputs, here, *flags, model=model, output=f"{here}/x/../model"), [str(here), "is the input"]


@mistake
def output_holds_the_model(inputs, here):
    (here / "all").mkdir()
    model = copied_model(inputs, here / "all" / "model")
    flags = [*inputs.calibration, "--overwrite"]
    return prune(inputs, here, *flags, model=model, output=here / "all"), [str(model), "holds the input"]


@mistake
def apply_into_the_model(inputs, here):
    model = copied_model(inputs, here / "model")
    return ["apply", "-m", model, "-p", inputs.plan, "-o", model, "--overwrite"], [str(model), "is the input"]


@mistake
def statistics_into_the_dataset(inputs, here):
    text = shutil.copy(inputs.text, here / "text.jsonl")
    flags = ["-m", inputs.model, "-o", text, "--overwrite", "--dataset", text, *CALIBRATION_FLAGS]
    return ["calibrate", *flags], [str(text), "is the input"]


@mistake
def plan_into_the_statistics(inputs, here):
    statistics = shutil.copy(inputs.statistics, here / "statistics.safetensors")
    return ["plan", "-s", statistics, "-o", statistics, "--overwrite"], [str(statistics), "is the input"]


@mistake
def plan_output_exists(inputs, here):
    shutil.copy(inputs.plan, here / "plan")
    return ["plan", "-s", inputs.statistics, "-o", here / "plan"], [str(here / "plan"), "--overwrite"]


@mistake
def missing_recipe(inputs, here):
    return prune(inputs, here, "-c", here / "nowhere.yaml"), [str(here / "nowhere.yaml"), "cannot be read"]


@mistake
def recipe_that_cannot_be_parsed(inputs, here):
    (here / "recipe.yaml").write_text("ratio: [0.2\n")
    return prune(inputs, here, "-c", here / "recipe.yaml"), [str(here / "recipe.yaml"), "cannot be parsed"]


@mistake
def evaluate_a_missing_model(inputs, here):
    return ["evaluate", "-m", here / "nowhere", "--dataset", inputs.text], [str(here / "nowhere"), "name a folder"]


@mistake
def evaluate_on_a_missing_text(inputs, here):
    flags = ["-m", inputs.model, "--dataset", here / "nowhere.jsonl"]
    return ["evaluate", *flags], [str(here / "nowhere.jsonl"), "no such file"]


@mistake
def time_without_a_prompt(inputs, here):
    return ["evaluate", "-m", inputs.model, "--speed", "--prompt-length", "0"], ["prompt_length=0", "at least 2"]


@mistake
def time_no_sequences(inputs, here):
    return ["evaluate", "-m", inputs.model, "--speed", "--batch-size", "0"], ["batch_size=0", "at least 1"]


@mistake
def time_no_new_tokens(inputs, here):
    return ["evaluate", "-m", inputs.model, "--speed", "--new-tokens", "0"], ["new_tokens=0", "at least 1"]


@mistake
def evaluate_on_nothing(inputs, here):
    path = lines(here / "empty.jsonl", [{"text": ""}])
    return ["evaluate", "-m", inputs.model, "--dataset", path], [str(path), "two tokens"]


@mistake
def evaluate_no_windows(inputs, here):
    flags = ["-m", inputs.model, "--dataset", inputs.text, "--num-samples", "0"]
    return ["evaluate", *flags], ["num_samples=0", "at least 1"]


@mistake
def evaluate_fewer_than_no_windows(inputs, here):
    flags = ["-m", inputs.model, "--dataset", inputs.text, "--num-samples", "-1"]
    return ["evaluate", *flags], ["num_samples=-1", "at least 1"]


@mistake
def evaluate_windows_of_one_token(inputs, here):
    flags = ["-m", inputs.model, "--dataset", inputs.text, "--seq-length", "1"]
    return ["evaluate", *flags], ["seq_length=1", "at least 2"]


@mistake
def inspect_nothing(inputs, here):
    return ["inspect", here / "nowhere"], [str(here / "nowhere"), "no such file"]


@mistake
def inspect_an_unpruned_model(inputs, here):
    return ["inspect", inputs.model], [str(inputs.model), "pruned model"]


@mistake
def inspect_foreign_safetensors(inputs, here):
    path = foreign(here / "foreign.safetensors")
    return ["inspect", path], [str(path), "unmarked"]


@mistake
def inspect_text(inputs, here):
    return ["inspect", inputs.text], [str(inputs.text), "not a safetensors file"]


def without_estimate(output: str) -> str:
    """What is printed besides the memory that a calibration needs, which is said before anything loads."""
    return re.sub(r"^plain: needs .* on cpu\n", "", output, flags=re.MULTILINE)


def check(result, command: str, named: list[str], late: bool = False):
    assert result.status == 2, result
    assert result.error.startswith(f"optimum-cli heapr {command}: error: ") and result.error.count("\n") == 1
    assert result.error.endswith("\n") and (late or without_estimate(result.output) == "")
    for part in named:
        assert part in result.error


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, run, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, named = MISTAKES[name](inputs, tmp_path)
    before, inputs_before = listing(tmp_path), listing(inputs.model.parent)
    # To root every folder looks writable; only writing tells.
    check(run(*arguments), arguments[0], named, late=name == "output_that_cannot_be_made")
    assert listing(tmp_path) == before and listing(inputs.model.parent) == inputs_before


@pytest.mark.parametrize("option, value, named", [
    ("--ratio", "0", ["ratio=0.0", "(0, 1)"]),
    ("--ratio", "1", ["ratio=1.0", "(0, 1)"]),
    ("--ratio", "1.2", ["ratio=1.2", "(0, 1)"]),
    ("--ratio", "-0.25", ["ratio=-0.25", "(0, 1)"]),
    ("--ratio", "nan", ["ratio=nan", "must be a finite number"]),
    ("--ratio", "inf", ["ratio=inf", "must be a finite number"]),
    ("--criterion", "haepr", ["'haepr'", "heapr, fisher", 'did you mean "heapr"?']),
    ("--allocation", "everywhere", ["'everywhere'", "global, layer, uniform"]),
    ("--width-multiple", "0", ["width_multiple=0", "at least 1"]),
    ("--width-multiple", "13", ["width_multiple=13", "at most 12"]),
    ("--min-width", "-1", ["min_width=-1", "at least 0"]),
    ("--min-width", "12", ["ratio=0.25", "min_width=12"]),
    ("--min-width", "1.5", ["min_width=1.5", "int"]),
    ("--seed", "-1", ["seed=-1", "at least 0"]),
])  # fmt: skip
def test_wrong_options_of_plan_and_prune(option, value, named, run, inputs, tmp_path):
    for command in (["plan"], ["prune", "-m", inputs.model]):
        arguments = [*command, "-s", inputs.statistics, "-o", tmp_path / "out", f"{option}={value}"]
        check(run(*arguments), command[0], named)
        assert listing(tmp_path) == {}


@pytest.mark.parametrize("option, named", [
    ("--num-samples=0", ["num_samples=0", "at least 1"]),
    ("--seq-length=1", ["seq_length=1", "at least 2"]),
    ("--batch-size=0", ["batch_size=0", "at least 1"]),
])  # fmt: skip
def test_wrong_options_of_calibrate(option, named, run, inputs, tmp_path):
    flags = ["-m", inputs.model, "-o", tmp_path / "out", *inputs.calibration, option]
    check(run("calibrate", *flags), "calibrate", named)
    assert listing(tmp_path) == {}


FOUND_BEFORE_THE_WORK = (
    "output_is_not_empty",
    "output_is_the_model",
    "output_is_a_file",
    "output_holds_the_model",
    "calibrate_without_a_dataset",
    "missing_dataset",
    "missing_text_column",
    "missing_text_to_measure_on",
    "empty_dataset",
    "unknown_shard_size",
    "unknown_shard_size_of_apply",
    "evaluate_on_a_missing_text",
    "time_without_a_prompt",
    "time_no_sequences",
    "time_no_new_tokens",
)


def test_mistakes_that_are_found_before_the_work(run, inputs, tmp_path, monkeypatch):
    """Hours of calibration must not be lost to a typing mistake, nor the minutes that loading takes."""
    from optimum_heapr.checkpoints import loading

    monkeypatch.setattr(loading, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    for name in FOUND_BEFORE_THE_WORK:
        folder = tmp_path / name
        folder.mkdir()
        arguments, named = MISTAKES[name](inputs, folder)
        result = run(*arguments)
        check(result, arguments[0], named)
        assert result.output == ""


def test_no_folders_above_the_output_are_left(run, inputs, tmp_path):
    arguments, named = MISTAKES["apply_a_plan_of_a_sibling"](inputs, tmp_path)
    before = listing(tmp_path)
    arguments[arguments.index("-o") + 1] = tmp_path / "new" / "folder" / "out"
    check(run(*arguments), arguments[0], named)
    assert listing(tmp_path) == before


def test_errors_of_a_fresh_process(inputs, tmp_path):
    """stderr as a shell sees it: no progress bars, no warnings, no tracebacks of the libraries around the line."""
    names = ["prune_a_dense_model", "model_without_weights", "model_with_truncated_weights", "broken_config"]
    names += ["statistics_of_another_model", "apply_a_plan_of_other_widths", "samples_of_one_token", "empty_dataset"]
    commands = []
    for name in names:
        (tmp_path / name).mkdir()
        commands.append([str(argument) for argument in MISTAKES[name](inputs, tmp_path / name)[0]])
    before = listing(tmp_path)
    code = (
        "import json, sys\nfrom optimum.commands.optimum_cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n    sys.argv = ['optimum-cli', 'heapr', *arguments]\n"
        "    try:\n        main()\n    except SystemExit as exit:\n        print(exit.code)\n"
    )
    output, error = start_python(code, json.dumps(commands)).communicate()
    assert without_estimate(output).split() == ["2"] * len(names), error
    assert len(error.splitlines()) == len(names), error
    for command, line in zip(commands, error.splitlines()):
        assert line.startswith(f"optimum-cli heapr {command[0]}: error: ")
    assert listing(tmp_path) == before
