# Licensed under the Apache License, Version 2.0
"""A model that cannot be pruned, or not be read."""

import json
import shutil

from tests.cli.errors.table import copied_model, mistake, prune, saved, truncated


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
def a_size_below_zero(inputs, here):
    model = copied_model(inputs, here / "broken")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": -8}))
    return prune(inputs, here, *inputs.calibration, model=model), [str(model), "config.json", "below 0"]


@mistake
def already_pruned(inputs, here):
    return prune(inputs, here, *inputs.calibration, model=inputs.pruned), [str(inputs.pruned), "pruned already"]


def _with_widths(inputs, here, change):
    """A pruned checkpoint of which the widths in `config.json` were changed by hand."""
    model = shutil.copytree(inputs.pruned, here / "changed")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "expert_widths": change(config["expert_widths"])}))
    named = [str(model), "expert_widths", "copy the checkpoint again"]
    return ["evaluate", "-m", model, "--dataset", inputs.text], named


@mistake
def widths_of_experts_that_are_not_there(inputs, here):
    return _with_widths(inputs, here, lambda widths: {"model.layers.7.mlp.experts": [1, 2], **widths})


@mistake
def widths_of_what_has_no_experts(inputs, here):
    return _with_widths(inputs, here, lambda widths: {"model.layers.0.self_attn": [1, 2], **widths})


@mistake
def widths_of_more_experts(inputs, here):
    return _with_widths(inputs, here, lambda widths: {path: [*some, 1] for path, some in widths.items()})


@mistake
def widths_that_are_words(inputs, here):
    return _with_widths(inputs, here, lambda widths: {path: ["many"] * len(some) for path, some in widths.items()})


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


def _damaged(file: str, content: str, command: str, named: list[str]):
    def made(inputs, here):
        model = copied_model(inputs, here / "model", "model.safetensors" if file.endswith(".index.json") else "")
        (model / file).write_text(content)
        flags = ["-p", inputs.plan] if command == "apply" else inputs.calibration
        return [command, "-m", model, "-o", here / "out", *flags], [str(model), *named]

    return made


# Settings that are no JSON, or JSON of something else: (file, its content, command, what is named)
SETTINGS = [
    ("config.json", "[]", "prune", ["config.json cannot be read (it holds no mapping)", "copy the model again"]),
    ("config.json", "[" * 100_000, "calibrate", ["config.json cannot be read (it is nested too deeply)"]),
    ("config.json", '{"model_type": []}', "apply", ["cannot be loaded (something in it is not of the kind"]),
    ("generation_config.json", "null", "apply", ["generation_config.json cannot be read (it holds no mapping)"]),
    ("tokenizer.json", "{", "prune", ["tokenizer.json cannot be read (Expecting property name"]),
    ("tokenizer.json", "{}", "prune", ["its tokenizer cannot be loaded (it has no 'added_tokens')"]),
    ("tokenizer_config.json", '"x"', "calibrate", ["tokenizer_config.json cannot be read (it holds no mapping)"]),
    ("model.safetensors.index.json", '{"weight_map": []}', "apply", ["its weight_map does not name a file beside it"]),
    (
        "model.safetensors.index.json",
        '{"weight_map": {"a": "../a.safetensors"}}',
        "prune",
        ["its weight_map does not"],
    ),
    ("adapter_config.json", "[]", "calibrate", ["adapter_config.json cannot be read (it holds no mapping)"]),
]
for file, content, command, named in SETTINGS:
    mistake(name=f"{command}: {file} {content[:30]}")(_damaged(file, content, command, named))


# A header of safetensors that is none: (header, what is named where transformers reads it, and where this package does)
HEADERS = ["[]", "3", '{"lm_head.weight": 1}', '{"lm_head.weight": {"dtype": "F32"}}']


def _bad_header(header: str, command: str):
    def made(inputs, here):
        model = copied_model(inputs, here / "model")
        content = header.encode()
        (model / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
        if command == "evaluate":
            return ["evaluate", "-m", model, "--dataset", inputs.text], [
                str(model),
                "cannot be loaded (Error while deser",
            ]
        named = ["model.safetensors:", "is not a safetensors file of known dtypes (", "it"]
        return ["apply", "-m", model, "-p", inputs.plan, "-o", here / "out"], named

    return made


for header in HEADERS:
    for command in ("evaluate", "apply"):
        mistake(name=f"{command}: weights with the header {header}")(_bad_header(header, command))
