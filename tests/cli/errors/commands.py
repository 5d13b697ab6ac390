# Licensed under the Apache License, Version 2.0
"""Command lines that cannot be parsed, recipes, and what evaluate and inspect are asked for."""

from tests.cli.errors.table import foreign, lines, mistake, prune


@mistake(early=True)
def an_option_that_there_is_not(inputs, here):
    flags = [*inputs.calibration, "--ration", "0.3"]
    return prune(inputs, here, *flags), ["unknown flag '--ration'", 'did you mean "--ratio"?']


@mistake(early=True)
def an_option_of_another_command(inputs, here):
    flags = ["-s", inputs.statistics, "-o", here / "out", "--memory=plain"]
    return ["plan", *flags], ["unknown flag '--memory'", "--help says what there is"]


@mistake(early=True)
def statistics_without_their_flag(inputs, here):
    return ["plan", inputs.statistics, "-o", here / "out"], ["-s/--statistics", "--compare"]


@mistake(early=True)
def a_word_behind_the_flags(inputs, here):
    return ["families", "qwen3_moe"], ["unexpected argument 'qwen3_moe'", "--help"]


@mistake(early=True)
def an_output_that_is_not_named(inputs, here):
    return ["apply", "-m", inputs.model, "-p", inputs.plan], ["required: -o/--output; --help says what there is"]


@mistake(early=True)
def a_number_that_is_none(inputs, here):
    return prune(inputs, here, *inputs.calibration, "--save-every", "often"), ["--save-every", "'often'", "--help"]


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


@mistake(early=True)
def evaluate_on_a_missing_text(inputs, here):
    flags = ["-m", inputs.model, "--dataset", here / "nowhere.jsonl"]
    return ["evaluate", *flags], [str(here / "nowhere.jsonl"), "no such file"]


@mistake(early=True)
def time_without_a_prompt(inputs, here):
    return ["evaluate", "-m", inputs.model, "--speed", "--prompt-length", "0"], ["--prompt-length 0", "at least 2"]


@mistake(early=True)
def time_no_sequences(inputs, here):
    return ["evaluate", "-m", inputs.model, "--speed", "--batch-size", "0"], ["--batch-size 0", "at least 1"]


@mistake(early=True)
def time_no_new_tokens(inputs, here):
    return ["evaluate", "-m", inputs.model, "--speed", "--new-tokens", "0"], ["--new-tokens 0", "at least 1"]


@mistake
def evaluate_on_nothing(inputs, here):
    path = lines(here / "empty.jsonl", [{"text": ""}])
    return ["evaluate", "-m", inputs.model, "--dataset", path], [str(path), "two tokens"]


@mistake
def evaluate_no_windows(inputs, here):
    flags = ["-m", inputs.model, "--dataset", inputs.text, "--num-samples", "0"]
    return ["evaluate", *flags], ["--num-samples 0", "at least 1"]


@mistake
def evaluate_fewer_than_no_windows(inputs, here):
    flags = ["-m", inputs.model, "--dataset", inputs.text, "--num-samples", "-1"]
    return ["evaluate", *flags], ["--num-samples -1", "at least 1"]


@mistake
def evaluate_windows_of_one_token(inputs, here):
    flags = ["-m", inputs.model, "--dataset", inputs.text, "--seq-length", "1"]
    return ["evaluate", *flags], ["--seq-length 1", "at least 2"]


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
