# Licensed under the Apache License, Version 2.0
"""Outputs that cannot be written, or whose writing would take something away."""

import shutil

from tests.cli.conftest import CALIBRATION_FLAGS
from tests.cli.errors.table import copied_model, mistake, prune


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


@mistake(early=True)
def output_is_a_file(inputs, here):
    (here / "out").write_text("mine")
    return prune(inputs, here, *inputs.calibration), [str(here / "out"), "is a file"]


@mistake(early=True)
def unknown_shard_size(inputs, here):
    flags = [*inputs.calibration, "--max-shard-size", "5XB"]
    return prune(inputs, here, *flags), ["--max-shard-size 5XB", "12GB"]


@mistake(early=True)
def unknown_shard_size_of_apply(inputs, here):
    flags = ["-m", inputs.model, "-p", inputs.plan, "-o", here / "out", "--max-shard-size", "0"]
    return ["apply", *flags], ["--max-shard-size 0", "12GB"]


@mistake(early=True)
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
    return ["apply", *flags], ["--output .", "'paper.tex'", "no record"]


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


@mistake(early=True)
def output_is_the_model(inputs, here):
    model = copied_model(inputs, here / "model")
    flags = [*inputs.calibration, "--overwrite"]
    return prune(inputs, here, *flags, model=model, output=f"{here}/x/../model"), [str(here), "is the input"]


@mistake(early=True)
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


@mistake(early=True)
def output_inside_the_model(inputs, here):
    model = copied_model(inputs, here / "model")
    return prune(inputs, here, *inputs.calibration, model=model, output=model / "pruned"), [
        str(model / "pruned"),
        f"lies inside the input '{model}'; name a place outside",
    ]


@mistake(early=True)
def apply_inside_the_model(inputs, here):
    model = copied_model(inputs, here / "model")
    command = ["apply", "-m", model, "-p", inputs.plan, "-o", model / "deep" / "pruned"]
    return command, [f"lies inside the input '{model}'"]


@mistake(early=True)
def output_inside_the_text(inputs, here):
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text("The quick brown fox.")
    flags = ["--dataset", here / "texts", "--num-samples", 1, "--seq-length", 8]
    return prune(inputs, here, *flags, output=here / "texts" / "out"), [f"lies inside the input '{here / 'texts'}'"]


@mistake(early=True)
def overwriting_a_card_that_was_edited(inputs, here):
    shutil.copytree(inputs.pruned, here / "out")
    with open(here / "out" / "README.md", "a") as card:
        card.write("Written by hand.")
    named = [
        str(here / "out"),
        "holds 'README.md', which was changed after this package wrote it",
        "name another folder",
    ]
    return prune(inputs, here, *inputs.calibration, "--overwrite"), named


@mistake(early=True)
def statistics_of_a_run_that_failed(inputs, here):
    shutil.copy(inputs.statistics, here / "out.statistics.safetensors")
    named = [f"--statistics {here / 'out.statistics.safetensors'}", "pass -s", "delete the file to calibrate anew"]
    return prune(inputs, here, *inputs.calibration), named


@mistake
def a_state_that_no_calibration_wrote(inputs, here):
    (here / "out.state").mkdir()
    (here / "out.state" / "model.safetensors").write_text("weights")
    named = [f"state {here / 'out.state'}", "no calibration wrote", "name another"]
    return prune(inputs, here, *inputs.calibration, "--memory", "streaming", "--resume"), named


@mistake(early=True)
def fits_that_are_not_gone_on_from(inputs, here):
    (here / "out.fits").mkdir()
    (here / "out.fits" / "block.fit.safetensors").write_text("hours of work")
    named = [f"fits {here / 'out.fits'}", "pass --resume to go on", "delete the folder to begin anew"]
    return prune(inputs, here, *inputs.calibration, "--compensate", "--compensation-scope", "block"), named


@mistake(early=True)
def fits_that_are_a_file(inputs, here):
    (here / "out.fits").write_text("mine")
    flags = ["--compensate", "--compensation-scope", "block", "--resume"]
    named = [f"fits {here / 'out.fits'}", "is a file", "delete it, or name another output"]
    return prune(inputs, here, *inputs.calibration, *flags), named
