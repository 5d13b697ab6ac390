# Licensed under the Apache License, Version 2.0
"""`HeaprConfig`: every bad value is refused in one line, and recipes come back from YAML, JSON and pruned models."""

import dataclasses
import inspect
import itertools
import json
import math
import typing
from pathlib import Path

import pytest
import yaml

from optimum_heapr import HeaprError
from optimum_heapr.configuration import (
    ALIGNMENTS,
    ALLOCATIONS,
    CRITERIA,
    GOALS,
    LAYOUTS,
    REDUCTIONS,
    HeaprConfig,
)
from optimum_heapr.utils.options import option_type


FIELDS = {option.name: option for option in dataclasses.fields(HeaprConfig)}

# A value for each option that is not its default; a new option has to be added here.
OTHER = {
    "ratio": 0.4,
    "target_parameters": 9_000,
    "target_size": "12GB",
    "max_loss_increase": 0.03,
    "criterion": "fisher",
    "reduction": "total",
    "reduction_over_sources": "max",
    "compensate": True,
    "compensation_scope": "block",
    "ridge": 0.5,
    "reconstruction_steps": 5,
    "reconstruction_learning_rate": 0.03,
    "allocation": "uniform",
    "num_experts": "24",
    "width_multiple": 8,
    "min_width": 2,
    "protect_unreached": True,
    "protect": "model.layers.0.* model.layers.1.*:3,7",
    "layout": "uniform",
    "align_for": "gguf",
    "tensor_parallel": 2,
    "statistics": "gram",
    "dataset": "data.jsonl",
    "dataset_config": "wikitext-2-raw-v1",
    "split": "validation",
    "text_column": "body",
    "packing": False,
    "dataset_streaming": True,
    "num_samples": 32,
    "seq_length": 256,
    "batch_size": 4,
    "skip_nonfinite": True,
    "eval_samples": 3,
    "eval_dataset": "held_out.jsonl",
    "seed": 7,
}

# One goal: two exclude each other.
EVERYTHING_ELSE = {name: value for name, value in OTHER.items() if name not in GOALS or name == "target_size"}


def test_the_defaults():
    config = HeaprConfig()
    assert config.ratio == 0.25 and config.goal == ("ratio", 0.25) and config == HeaprConfig(ratio=None)
    assert config.criterion == "heapr" and config.allocation == "global"
    assert (config.num_samples, config.seq_length, config.batch_size, config.seed) == (128, 2048, 1, 0)
    assert (config.width_multiple, config.min_width, config.protect_unreached) == (1, 0, False)
    assert config.dataset is None and config.layout == "variable" and config.text_column == "text"


def test_every_option_is_explained_in_one_place_for_the_command_line_and_in_the_class():
    for name, option in FIELDS.items():
        assert len(option.metadata["help"]) > 8 and "\n" not in option.metadata["help"]
        assert f"\n    {name} (`" in inspect.cleandoc(HeaprConfig.__doc__)
        assert option_type(typing.get_type_hints(HeaprConfig)[name]) in (str, int, float, bool)


# How much goes


def test_one_goal_is_taken_and_the_others_are_not_made_up():
    config = HeaprConfig(target_size="9GB")
    assert config.goal == ("target_size", "9GB") and config.ratio is None and config.target_parameters is None
    assert HeaprConfig(target_parameters=5).goal == ("target_parameters", 5)


@pytest.mark.parametrize(("first", "second"), itertools.combinations(GOALS, 2))
def test_two_goals_are_refused_however_they_are_given(tmp_path, first, second):
    both = {first: OTHER[first], second: OTHER[second]}
    message = f"{second}={OTHER[second]!r}: {first}={OTHER[first]!r} is given as well; leave one out"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(both))
    for make in (
        lambda: HeaprConfig(**both),
        lambda: HeaprConfig.from_dict(both),
        lambda: HeaprConfig.from_file(tmp_path / "recipe.yaml"),
        lambda: HeaprConfig().replace(**both),
    ):
        with pytest.raises(HeaprError) as error:
            make()
        assert str(error.value) == message


def test_an_artefact_of_an_earlier_version_held_the_ratio_that_was_reached_beside_the_target(tmp_path):
    values = {"ratio": 0.4321, "target_size": "12GB", "seed": 3}
    assert HeaprConfig.from_artefact(values) == HeaprConfig(target_size="12GB", seed=3)
    assert HeaprConfig.from_artefact({"ratio": 0.4}) == HeaprConfig(ratio=0.4)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "heapr_config": values}))
    assert HeaprConfig.from_pretrained(tmp_path) == HeaprConfig(target_size="12GB", seed=3)


# Bad values


def refused(expected, **options):
    with pytest.raises(HeaprError) as error:
        HeaprConfig(**options)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("ratio", [0, 1, 1.2, -0.1, 100, 0.0, 1.0])
def test_a_ratio_outside_0_and_1_is_refused(ratio):
    step = "must lie in (0, 1); 0.25 removes a quarter of all atomic experts"
    refused(f"ratio={float(ratio)}: {step}", ratio=ratio)


@pytest.mark.parametrize("ratio", [math.nan, math.inf, -math.inf])
def test_a_ratio_that_is_no_number_is_refused(ratio):
    refused(f"ratio={ratio}: must be a finite number", ratio=ratio)


def test_sizes_and_protection_are_checked():
    assert HeaprConfig(target_size=12_000_000_000).target_size == "12000000000"
    assert HeaprConfig(protect=["a.*", "b:1"]).protect == "a.* b:1"
    refused("target_size='12 gigs': must be a number of bytes, or one with a unit", target_size="12 gigs")
    for nothing in ("", " ", []):
        refused("must name an expert block; leave it out to protect none", protect=nothing)


@pytest.mark.parametrize("ratio", [1e-9, 0.5, 1 - 1e-9])
def test_any_ratio_in_between_is_taken(ratio):
    assert HeaprConfig(ratio=ratio).ratio == ratio


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ratio", "0.25", "ratio='0.25': must be of type float, not str"),
        ("ratio", True, "ratio=True: must be of type float, not bool"),
        ("ratio", [0.25], "ratio=[0.25]: must be of type float, not list"),
        ("ridge", "much", "ridge='much': must be of type float, not str"),
        ("num_samples", 12.0, "num_samples=12.0: must be of type int, not float"),
        ("num_samples", True, "num_samples=True: must be of type int, not bool"),
        ("num_samples", "12", "num_samples='12': must be of type int, not str"),
        ("seed", None, "seed=None: must be of type int, not NoneType"),
        ("criterion", None, "criterion=None: must be of type str, not NoneType"),
        ("criterion", 3, "criterion=3: must be of type str, not int"),
        ("protect_unreached", 1, "protect_unreached=1: must be of type bool, not int"),
        ("protect_unreached", "yes", "protect_unreached='yes': must be of type bool, not str"),
        ("compensate", 0, "compensate=0: must be of type bool, not int"),
        ("target_size", 1.5e9, "target_size=1500000000.0: must be of type str, not float"),
        ("target_size", True, "target_size=True: must be of type str, not bool"),
        ("protect", [1], "protect=[1]: must be of type str, not list"),
        ("dataset", 5, "dataset=5: must be of type str, not int"),
        ("dataset", ["a", "b"], "dataset=['a', 'b']: must be of type str, not list"),
    ],
)
def test_a_wrong_type_is_refused_naming_both(name, value, expected):
    refused(expected, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("width_multiple", 0, 1),
        ("min_width", -1, 0),
        ("num_samples", 0, 1),
        ("seq_length", 1, 2),
        ("batch_size", 0, 1),
        ("seed", -1, 0),
        ("tensor_parallel", 0, 1),
        ("ridge", -0.1, 0),
    ],
)
def test_a_number_below_its_least_is_refused(name, value, least):
    refused(f"{name}={value}: must be at least {least}; leave it out for the default", **{name: value})
    assert getattr(HeaprConfig(**{name: least}), name) == least


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_ridge_that_is_not_finite_is_refused(value):
    refused(f"ridge={value}: must be a finite number", ridge=value)


def test_a_seed_beyond_32_bits_is_refused():
    assert HeaprConfig(seed=2**32 - 1).seed == 2**32 - 1
    refused("seed=4294967296: must be below 2**32", seed=2**32)


@pytest.mark.parametrize(
    ("name", "value", "choices", "hint"),
    [
        ("criterion", "heaper", CRITERIA, '; did you mean "heapr"?'),
        ("criterion", "", CRITERIA, ""),
        ("criterion", "HEAPR", CRITERIA, ""),
        ("allocation", "globl", ALLOCATIONS, '; did you mean "global"?'),
        ("layout", "stock", LAYOUTS, ""),
        ("align_for", "vlm", ALIGNMENTS, '; did you mean "vllm"?'),
        ("reduction", "sum", REDUCTIONS, ""),
    ],
)
def test_an_unknown_choice_is_refused_naming_all_and_the_nearest(name, value, choices, hint):
    with pytest.raises(HeaprError) as error:
        HeaprConfig(**{name: value})
    assert str(error.value) == f"{name}={value!r}: must be one of {', '.join(choices)}{hint}"


def test_every_choice_is_taken():
    for option in FIELDS.values():
        for choice in option.metadata["choices"] or ():
            # compensation and obs are at odds with vectors alone, uniform layouts with other allocations
            values = {"compensate": True} if option.name == "compensation_scope" else {}
            assert getattr(HeaprConfig(**values, **{option.name: choice}), option.name) == choice


def test_the_uniform_layout_implies_its_allocation_and_refuses_others():
    assert HeaprConfig(layout="uniform").allocation == "uniform"
    assert HeaprConfig(layout="uniform", allocation="uniform").allocation == "uniform"
    refused("allocation='layer': layout='uniform' needs allocation='uniform'", layout="uniform", allocation="layer")


def test_experts_go_from_the_router_of_the_stock_layout_alone():
    config = HeaprConfig(layout="uniform", num_experts=24)
    assert (config.num_experts, config.allocation) == ("24", "uniform")
    refused("num_experts=24: needs layout='uniform', not layout='variable'", num_experts=24)
    for wrong in (0, -3, "many", "1.5"):
        refused(f"num_experts='{wrong}': must be a number, or auto", layout="uniform", num_experts=wrong)


def test_statistics_that_are_not_enough_are_refused():
    for options in ({"criterion": "obs"}, {"compensate": True}):
        refused("needs 'gram'; leave statistics at 'auto'", statistics="vector", **options)
        assert HeaprConfig(**options).needs_grams
    assert not HeaprConfig(compensate=True, compensation_scope="block", statistics="vector").needs_grams
    refused("compensation_scope='block': set compensate=True", compensation_scope="block")
    assert not HeaprConfig().needs_grams and HeaprConfig(statistics="gram").needs_grams


def test_whole_numbers_and_paths_are_taken_where_they_mean_the_same():
    assert HeaprConfig(ridge=1).ridge == 1.0 and isinstance(HeaprConfig(ridge=1).ridge, float)
    assert HeaprConfig(dataset=Path("a") / "b").dataset == str(Path("a") / "b")


# Unknown keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("ration", "ratio"), ("num_sample", "num_samples"), ("num-samples", "num_samples"), ("seqlength", "seq_length")],
)
def test_an_unknown_key_suggests_the_nearest(key, nearest):
    for make in (HeaprConfig.from_dict, lambda values: HeaprConfig().replace(**values)):
        with pytest.raises(HeaprError) as error:
            make({key: 1})
        assert str(error.value) == f'{key!r}: unknown option of HeaprConfig; did you mean "{nearest}"?'


def test_an_unknown_key_near_none_lists_all():
    with pytest.raises(HeaprError, match=f"'xyzzy': unknown option of HeaprConfig; known are {', '.join(FIELDS)}"):
        HeaprConfig.from_dict({"xyzzy": 1})
    with pytest.raises(HeaprError, match="5: unknown option of HeaprConfig"):
        HeaprConfig.from_dict({5: 1})


def test_something_else_than_a_mapping_is_refused():
    with pytest.raises(HeaprError, match=r"config=\['ratio'\]: must be a mapping of option names to values"):
        HeaprConfig.from_dict(["ratio"])


# Copies and round trips


def test_the_table_of_other_values_names_every_option():
    assert list(OTHER) == list(FIELDS)
    assert all(value != FIELDS[name].default for name, value in OTHER.items())


def test_a_copy_with_changes_is_validated_anew():
    config = HeaprConfig(ratio=0.4, seed=3)
    changed = config.replace(ratio=0.5, criterion="random")
    assert (changed.ratio, changed.criterion, changed.seed) == (0.5, "random", 3)
    assert config.ratio == 0.4 and config.replace() == config is not config.replace()
    with pytest.raises(HeaprError, match=r"ratio=1\.5"):
        config.replace(ratio=1.5)


@pytest.mark.parametrize("values", [{}, EVERYTHING_ELSE], ids=["defaults", "everything else"])
def test_a_config_comes_back_from_yaml_and_json(tmp_path, values):
    config = HeaprConfig(**values)
    assert HeaprConfig.from_dict(config.to_dict()) == config
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config.to_dict()))
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(config.to_dict()))
    (tmp_path / "recipe.json").write_text(json.dumps(config.to_dict()))
    saved = config.save_pretrained(tmp_path)
    assert saved == tmp_path / "heapr_config.json"
    for path in (*tmp_path.glob("recipe.*"), saved):
        loaded = HeaprConfig.from_file(path)
        assert loaded == config
        assert [type(value) for value in loaded.to_dict().values()] == [type(v) for v in config.to_dict().values()]


# The config of a pruned model


def test_the_config_of_a_pruned_model_comes_back(tmp_path):
    config = HeaprConfig(**EVERYTHING_ELSE)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "heapr_config": config.to_dict()}))
    assert HeaprConfig.from_pretrained(tmp_path) == HeaprConfig.from_pretrained(str(tmp_path)) == config


def test_a_model_that_was_not_pruned_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    with pytest.raises(HeaprError, match=r"model='.*': config\.json has no heapr_config; name a model that was"):
        HeaprConfig.from_pretrained(tmp_path)


def test_a_model_that_cannot_be_found_or_read_is_refused(tmp_path):
    for name in (tmp_path / "missing", "nobody/nothing"):
        with pytest.raises(HeaprError, match=r"model='.*': has no config\.json that can be read") as error:
            HeaprConfig.from_pretrained(name)
        assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(HeaprError, match="has no config.json that can be read"):
        HeaprConfig.from_pretrained(tmp_path)


def test_a_foreign_heapr_config_is_refused(tmp_path):
    for content, expected in (({"colour": "blue"}, "'colour': unknown option"), ("heapr", "must be a mapping")):
        (tmp_path / "config.json").write_text(json.dumps({"heapr_config": content}))
        with pytest.raises(HeaprError, match=expected):
            HeaprConfig.from_pretrained(tmp_path)


def test_a_change_of_how_much_goes_takes_the_place_of_what_was():
    config = HeaprConfig(target_size="3MB")
    assert config.replace(ratio=0.1).target_size is None
    assert config.replace(target_parameters=9_000).target_size is None
    assert config.replace(seed=3).target_size == "3MB"
    assert config.replace(target_size=None).ratio == HeaprConfig().ratio
    with pytest.raises(HeaprError, match=r"target_size='3MB': ratio=0.1 is given as well; leave one out"):
        config.replace(ratio=0.1, target_size="3MB")
