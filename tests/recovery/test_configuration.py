# Licensed under the Apache License, Version 2.0
"""`RecoveryConfig`: explained in one place, and every bad value refused in one line."""

import dataclasses
import inspect
import typing

import pytest

from optimum_heapr import HeaprError, RecoveryConfig
from optimum_heapr.utils.options import option_type


def refused(expected, **options):
    with pytest.raises(HeaprError) as error:
        RecoveryConfig(**options)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_every_option_is_explained_for_the_command_line_and_in_the_class():
    for option in dataclasses.fields(RecoveryConfig):
        assert len(option.metadata["help"]) > 8 and "\n" not in option.metadata["help"]
        assert f"\n    {option.name} (`" in inspect.cleandoc(RecoveryConfig.__doc__)
        assert option_type(typing.get_type_hints(RecoveryConfig)[option.name]) in (str, int, float, bool)


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_recipe_comes_back(ending, tmp_path):
    import json

    config = RecoveryConfig(targets="experts", distillation_weight=0.5, dataset="a.jsonl", seed=3)
    path = tmp_path / f"recipe.{ending}"
    path.write_text(json.dumps(config.to_dict()))
    assert RecoveryConfig.from_file(path) == config
    assert config.distills and not RecoveryConfig().distills


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "targets",
            "expert",
            "targets='expert': must be one of attention, experts, router, all; did you mean \"experts\"?",
        ),
        ("rank", 0, "rank=0: must be at least 1"),
        ("rank", "8", "rank='8': must be of type int, not str"),
        ("learning_rate", 0, "learning_rate=0.0: must be above 0"),
        ("learning_rate", float("nan"), "learning_rate=nan: must be a finite number"),
        ("temperature", -1, "temperature=-1.0: must be above 0"),
        ("alpha", 0, "alpha=0.0: must be above 0"),
        ("weight_interpolation", 0, "weight_interpolation=0.0: must lie in (0, 1]; 1 keeps the whole update"),
        ("weight_interpolation", 1.5, "weight_interpolation=1.5: must lie in (0, 1]"),
        ("held_out", 0, "held_out=0.0: must lie in (0, 1)"),
        ("held_out", 1, "held_out=1.0: must lie in (0, 1)"),
        ("distillation_weight", -0.1, "distillation_weight=-0.1: must be at least 0"),
        ("cross_entropy_weight", 0, "distillation_weight=0.0: cross_entropy_weight is 0 as well"),
        ("top_k_logits", 0, "top_k_logits=0: must be at least 1"),
        ("micro_batch_size", 3, "micro_batch_size=3: must divide batch_size=16"),
        ("num_samples", 1, "num_samples=1: must be at least 2"),
        ("seed", 2**32, "seed=4294967296: must be below 2**32"),
        ("dropout", 1, "dropout=1.0: must lie in [0, 1)"),
        ("dropout", 0.1, "dropout=0.1: PEFT has no dropout for LoRA on parameters, such as packed experts"),
    ],
)
def test_bad_values_are_refused(name, value, expected):
    refused(expected, **{name: value})


def test_dropout_is_for_linear_layers():
    assert RecoveryConfig(targets="attention", dropout=0.1).dropout == 0.1


@pytest.mark.parametrize("name", ["use_dora", "bias", "learning_rat"])
def test_unknown_options_are_refused(name):
    with pytest.raises(HeaprError, match=f"'{name}': unknown option of RecoveryConfig"):
        RecoveryConfig.from_dict({name: True})
