# Licensed under the Apache License, Version 2.0
"""A quantized model that cannot be turned into floating point, or not be believed."""

import torch

from tests.cli.errors.table import copied_model, mistake, prune
from tests.quantized_checkpoints import fp8_settings, rewrite


DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"


def _fp8(inputs, here, change=lambda stored: stored):
    """The model with the down projections of experts in FP8, of which `change` makes something else."""

    def quantize(name, tensor):
        if not name.endswith("down_proj.weight"):
            return {name: tensor}
        grid = [-(-size // 16) for size in tensor.shape]
        stored = {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(grid)}
        return change(stored) if name == DOWN else stored

    model = copied_model(inputs, here / "model")
    rewrite(model, quantize, fp8_settings())
    return model


@mistake
def a_quantized_model_as_it_is(inputs, here):
    model = _fp8(inputs, here)
    named = [str(model), "its weights are quantized (fp8)", "--dequantize", "name an unquantized checkpoint"]
    return ["apply", "-m", model, "-p", inputs.plan, "-o", here / "out"], named


@mistake
def an_unknown_quantizer(inputs, here):
    model = copied_model(inputs, here / "model")
    rewrite(model, lambda name, tensor: {name: tensor}, {"quant_method": "awq", "bits": 4})
    named = [str(model), "its weights are quantized (awq)", "bfloat16 that it was made from", "fp8"]
    flags = ["-o", here / "out", *inputs.calibration, "--dequantize", "--memory", "streaming"]
    return ["calibrate", "-m", model, *flags], named


@mistake
def weights_whose_package_is_not_installed(inputs, here):
    model = copied_model(inputs, here / "model")
    rewrite(model, lambda name, tensor: {name: tensor}, {"quant_method": "vptq"})
    named = [str(model), "cannot be loaded", "pip install -U vptq", "install what that names"]
    return ["evaluate", "-m", model, "--dataset", inputs.text], named


@mistake
def a_quantizer_that_is_no_name(inputs, here):
    model = copied_model(inputs, here / "model")
    rewrite(model, lambda name, tensor: {name: tensor}, {"quant_method": ["fp8"]})
    named = [str(model), "its weights are quantized (['fp8'])", "does not know", "that is quantized otherwise"]
    return ["evaluate", "-m", model, "--dataset", inputs.text], named


def _without_scale(stored):
    return {DOWN: stored[DOWN]}


def _of_another_shape(stored):
    return {DOWN: stored[DOWN], f"{DOWN}_scale_inv": torch.ones(5, 2)}


def _of_another_checkpoint(stored):
    """As where the files of an unquantized checkpoint were copied over some of these."""
    return {**stored, DOWN: stored[DOWN].float()}


# What is the matter with one weight, and what is named
DAMAGED = [
    (_without_scale, ["1 of its weights", "no scales", DOWN, "download it again"]),
    (_of_another_shape, ["scales of other shapes", DOWN, "[5, 2]", "files belong together"]),
    (_of_another_checkpoint, ["1 of its weights", "or are not and have some", DOWN]),
]


def _damaged(change, named, command, flags):
    def made(inputs, here):
        model = _fp8(inputs, here, change)
        source = ["-p", inputs.plan] if command == "apply" else inputs.calibration
        return [command, "-m", model, "-o", here / "out", *source, "--dequantize", *flags], [str(model), *named]

    return made


for change, named in DAMAGED:
    for command, flags in (("prune", []), ("calibrate", ["--memory", "streaming"]), ("apply", [])):
        mistake(name=f"{command}: a quantized weight {change.__name__}")(_damaged(change, named, command, flags))


# Flags of a run that is to write FP8 again, and what is named
REQUANTIZING = [
    (["--requantize"], ["--requantize", "pass --dequantize as well"]),
    (["--requantize", "--dequantize", "--packed"], ["--requantize", "leave --packed out"]),
    (["--requantize", "--dequantize"], ["--requantize", "--layout variable", "--layout uniform"]),
]
for flags, named in REQUANTIZING:

    @mistake(early=True, name=f"prune {' '.join(flags)}")
    def _requantized(inputs, here, flags=flags, named=named):
        return prune(inputs, here, *inputs.calibration, *flags), named


@mistake(early=True)
def requantize_what_was_not_quantized(inputs, here):
    flags = ["--requantize", "--dequantize", "--layout", "uniform"]
    return prune(inputs, here, *inputs.calibration, *flags), [
        str(inputs.model),
        "is not (unquantized)",
        "leave it out",
    ]
