# Licensed under the Apache License, Version 2.0
"""Options out of their range, of the wrong type, or that exclude each other."""

from tests.cli.errors.table import mistake, prune


# (flag, its value, what is named)
PLANNING = [
    ("--ratio", "0", ["--ratio 0.0", "(0, 1)"]),
    ("--ratio", "1", ["--ratio 1.0", "(0, 1)"]),
    ("--ratio", "1.2", ["--ratio 1.2", "(0, 1)"]),
    ("--ratio", "-0.25", ["--ratio -0.25", "(0, 1)"]),
    ("--ratio", "nan", ["--ratio nan", "must be a finite number"]),
    ("--ratio", "inf", ["--ratio inf", "must be a finite number"]),
    ("--criterion", "haepr", ["--criterion haepr", "heapr, fisher", 'did you mean "heapr"?']),
    ("--allocation", "everywhere", ["--allocation everywhere", "global, layer, uniform"]),
    ("--width-multiple", "0", ["--width-multiple 0", "at least 1"]),
    ("--width-multiple", "13", ["--width-multiple 13", "at most 12"]),
    ("--min-width", "-1", ["--min-width -1", "at least 0"]),
    ("--min-width", "12", ["--ratio 0.25", "--min-width 12"]),
    ("--min-width", "1.5", ["--min-width 1.5", "int"]),
    ("--seed", "-1", ["--seed -1", "at least 0"]),
    ("--target-size", "12 gigs", ["--target-size '12 gigs'", "12GB", "11.5GiB"]),
    ("--target-size", "1KB", ["--target-size 1KB", "must lie between", "what the model has"]),
    ("--target-parameters", "0", ["--target-parameters 0", "at least 1"]),
    ("--protect", " ", ["--protect ' '", "must name an expert block"]),
    ("--protect", "model.layers.9.*", ["--protect 'model.layers.9.*'", "matches no expert block"]),
    ("--protect", "*:99", ["--protect '*:99'", "has no expert 99"]),
    ("--tensor-parallel", "64", ["--tensor-parallel 64", "multiples of 64", "lower --tensor-parallel"]),
    ("--align-for", "onnx", ["--align-for onnx", "none, vllm, gguf, fp8, quantization"]),
    ("--ridge", "-1", ["--ridge -1.0", "at least 0"]),
    ("--reduction", "median", ["--reduction median", "mean, total"]),
    ("--compensation-scope", "block", ["--compensation-scope block", "--compensate"]),
]  # fmt: skip
CALIBRATION = [
    ("--num-samples", "0", ["--num-samples 0", "at least 1"]),
    ("--seq-length", "1", ["--seq-length 1", "at least 2"]),
    ("--batch-size", "0", ["--batch-size 0", "at least 1"]),
    ("--seed", "4294967296", ["--seed 4294967296", "below 2**32"]),
    ("--dtype", "float33", ["--dtype float33", 'did you mean "float32"?']),
    ("--memory", "much", ["--memory much", "plain"]),
    ("--activation-memory", "8 gigs", ["--activation-memory '8 gigs'", "12GB"]),
    ("--tp-plan", "atuo", ["--tp-plan atuo", "auto or experts", 'did you mean "auto"?']),
    ("--tp-plan", "auto", ["--tp-plan auto", "one process", "start several, with torchrun"]),
    ("--statistics", "vectors", ["--statistics vectors", 'did you mean "vector"?']),
]  # fmt: skip


def _plan(flag: str, value: str, named: list[str]):
    return lambda inputs, here: (["plan", "-s", inputs.statistics, "-o", here / "out", f"{flag}={value}"], named)


def _prune(flag: str, value: str, named: list[str]):
    def made(inputs, here):
        return ["prune", "-m", inputs.model, "-s", inputs.statistics, "-o", here / "out", f"{flag}={value}"], named

    return made


def _calibrate(flag: str, value: str, named: list[str]):
    def made(inputs, here):
        return ["calibrate", "-m", inputs.model, "-o", here / "out", *inputs.calibration, f"{flag}={value}"], named

    return made


for flag, value, named in PLANNING:
    mistake(name=f"plan {flag} {value}")(_plan(flag, value, named))
    mistake(name=f"prune {flag} {value}")(_prune(flag, value, named))
for flag, value, named in CALIBRATION:
    mistake(name=f"calibrate {flag} {value}")(_calibrate(flag, value, named))


@mistake
def two_goals(inputs, here):
    flags = ["-s", inputs.statistics, "-o", here / "out", "--ratio", "0.3", "--target-size", "1MB"]
    return ["plan", *flags], ["--target-size 1MB: --ratio 0.3 is given as well; leave one out"]


@mistake(early=True)
def two_goals_in_a_recipe(inputs, here):
    (here / "recipe.yaml").write_text("ratio: 0.3\ntarget_parameters: 9000\n")
    flags = ["-m", inputs.model, "-o", here / "out", *inputs.calibration, "-c", here / "recipe.yaml"]
    return ["prune", *flags], ["--target-parameters 9000: --ratio 0.3 is given as well; leave one out"]


@mistake
def a_target_that_no_uniform_width_gives(inputs, here):
    flags = ["-s", inputs.statistics, "-o", here / "out", "--target-parameters", "29000"]
    named = ["--target-parameters 29000 (--ratio 0.87", "fewer than 8 of 12 atomic experts", "largest ratio is 0.3333"]
    return ["plan", *flags, "--layout", "uniform", "--width-multiple", "8"], named


@mistake
def a_prompt_without_text(inputs, here):
    flags = ["-m", inputs.model, "-o", here / "out", *inputs.calibration, "--prompt", "A dog", " "]
    return ["prune", *flags], ["--prompt: ' ' has no tokens", "write something"]


@mistake
def stock_experts_as_linear_layers(inputs, here):
    flags = [*inputs.calibration, "--layout", "uniform", "--experts-as", "linear"]
    return prune(inputs, here, *flags), ["--experts-as linear", "--layout variable", "leave it out"]


@mistake
def linear_layers_from_packed_tensors(inputs, here):
    flags = [*inputs.calibration, "--packed", "--experts-as", "linear"]
    return prune(inputs, here, *flags), ["--experts-as linear", "--packed"]
