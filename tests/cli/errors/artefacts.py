# Licensed under the Apache License, Version 2.0
"""Statistics and plans: of another model, damaged, or something else."""

import dataclasses
import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_heapr import PruningPlan
from tests.cli.errors.table import foreign, mistake, prune, saved, truncated


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


def _changed(kind: str, part: tuple[str, ...], value, named: list[str]):
    """An artefact whose document has another value in one place."""

    def made(inputs, here):
        source = getattr(inputs, kind)
        with safe_open(source, "pt") as file:
            metadata = file.metadata()
        document = json.loads(metadata["document"])
        inner = document
        for name in part[:-1]:
            inner = inner[name]
        if value is None:
            del inner[part[-1]]
        else:
            inner[part[-1]] = value
        save_file(load_file(source), here / "changed", {**metadata, "document": json.dumps(document)})
        command = (
            ["plan", "-s", here / "changed"]
            if kind == "statistics"
            else ["apply", "-m", inputs.model, "-p", here / "changed"]
        )
        return [*command, "-o", here / "out"], [str(here / "changed"), *named]

    return made


# (artefact, place in its document, what stands there, what is named)
PARTS = [
    (
        "statistics",
        ("fingerprint",),
        [],
        ["is damaged (its 'fingerprint' is [], which it cannot be); calibrate again"],
    ),
    ("statistics", ("fingerprint", "model"), "x", ["is damaged (its 'model' is \"x\", which it cannot be)"]),
    ("statistics", ("fingerprint", "data"), None, ["is damaged (it has no 'data')"]),
    ("statistics", ("blocks",), ["nowhere"], ["is damaged (it has no 'nowhere."]),
    ("plan", ("blocks",), 3, ["(its 'blocks' is 3, which it cannot be); plan again"]),
    ("plan", ("model",), [], ["(its 'model' is [], which it cannot be)"]),
    ("plan", ("model", "num_parameters"), None, ["(it has no 'num_parameters')"]),
    ("plan", ("loss_increase",), {}, ["(it has no 'model.layers.0.mlp.experts')"]),
    ("plan", ("unreached",), "x", ["(its 'unreached' is \"x\", which it cannot be)"]),
    ("plan", ("tokens",), 3, ["(its 'tokens' is 3, which it cannot be)"]),
    ("plan", ("config", "ratio"), "x", ["--ratio x: must be of type float"]),
]
for kind, part, value, named in PARTS:
    mistake(name=f"{kind}: {'.'.join(part)} is {value!r}")(_changed(kind, part, value, named))


@mistake
def statistics_with_a_header_that_is_none(inputs, here):
    (here / "statistics").write_bytes((2).to_bytes(8, "little") + b"[]")
    named = [str(here / "statistics"), "not a safetensors file", "make it again"]
    return ["plan", "-s", here / "statistics", "-o", here / "out"], named
