# Licensed under the Apache License, Version 2.0
"""Configurations of any kind: recipes are read from YAML and JSON or refused in one line, and options without use are named."""

import dataclasses

import pytest

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner
from optimum_heapr.recovery.configuration import RecoveryConfig
from tests.helpers import tiny_model


def test_a_recipe_may_be_short(tmp_path):
    (tmp_path / "recipe.yaml").write_text("# a quarter\nratio: 0.25\ndataset: data.jsonl\nprotect_unreached: true\n")
    config = HeaprConfig.from_file(str(tmp_path / "recipe.yaml"))
    assert config == HeaprConfig(dataset="data.jsonl", protect_unreached=True)


def test_small_numbers_in_json_are_numbers(tmp_path):
    (tmp_path / "recipe.json").write_text('{"ratio": 1e-3}')
    assert HeaprConfig.from_file(tmp_path / "recipe.json").ratio == 0.001


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "1.0e-3", "0.001", "10e-4", "+1e-3"])
def test_numbers_in_yaml_are_written_as_people_write_them(tmp_path, written):
    (tmp_path / "recipe.yaml").write_text(f"ridge: {written}\ndataset: 1e-3.jsonl\n")
    config = HeaprConfig.from_file(tmp_path / "recipe.yaml")
    assert config.ridge == 0.001 and config.dataset == "1e-3.jsonl"


# Files that are refused


def file_refused(path, expected, content=None):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(HeaprError, match=expected) as error:
        HeaprConfig.from_file(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    file_refused(tmp_path / "none.yaml", r"config='.*none\.yaml': cannot be read \(.*\); name a YAML or JSON file")
    file_refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.json"])
@pytest.mark.parametrize("content", ["ratio: [0.25", "{", '{"ratio": 0.25', b"\xff\xfe\x00bin", "ratio: *unknown"])
def test_a_file_that_is_neither_is_refused(tmp_path, name, content):
    file_refused(tmp_path / name, rf"config='.*{name}': cannot be (parsed|read) \(", content)


@pytest.mark.parametrize("content", ["", "- ratio", "0.25", "ratio", "null"])
def test_a_file_without_a_mapping_is_refused(tmp_path, content):
    file_refused(tmp_path / "recipe.yaml", "must hold a mapping of option names to values, one a line", content)


@pytest.mark.parametrize("content", ["seed: 2024-13-45", "seed: " + "9" * 5000, "[" * 20000])
def test_what_the_parsers_choke_on_is_refused(tmp_path, content):
    file_refused(tmp_path / "recipe.yaml", "cannot be parsed", content)
    file_refused(tmp_path / "recipe.json", "cannot be parsed", '{"seed": ' + content.removeprefix("seed: ") + "}")


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {flag}']",
        "!!python/object/apply:builtins.open ['{flag}', 'w']",
        "!!python/name:os.system",
        "!!python/object/new:os.system ['touch {flag}']",
    ],
)
def test_tags_that_would_run_code_are_refused(tmp_path, tag):
    flag = tmp_path / "flag"
    file_refused(tmp_path / "recipe.yaml", "cannot be parsed", "dataset: " + tag.format(flag=flag))
    assert not flag.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("ratio: 1.2", r"ratio=1\.2: must lie in \(0, 1\)"),
        ("ratio: .nan", r"ratio=nan: must be a finite number"),
        ("ration: 0.2", """'ration': unknown option of HeaprConfig; did you mean "ratio"?"""),
        ("ratio: a quarter", "ratio='a quarter': must be of type float, not str"),
        ("1: 2", "1: unknown option"),
    ],
)
def test_bad_values_in_a_file_are_refused_like_those_in_code(tmp_path, content, expected):
    file_refused(tmp_path / "recipe.yaml", expected.replace("?", r"\?"), content)


# Options without use


@pytest.mark.parametrize(
    ("config_class", "options", "said"),
    [
        (HeaprConfig, {"reduction": "total", "criterion": "obs"}, "criterion='obs'"),
        (HeaprConfig, {"reduction": "total", "criterion": "fisher"}, None),
        (HeaprConfig, {"ridge": 0.0123}, "criterion='heapr' and compensate=False"),
        (HeaprConfig, {"ridge": 0.0124, "criterion": "obs"}, None),
        (HeaprConfig, {"ridge": 0.0124, "compensate": True}, None),
        (HeaprConfig, {"reconstruction_learning_rate": 0.0123}, "reconstruction_steps=0"),
        (HeaprConfig, {"eval_dataset": "of-no-use.jsonl", "eval_samples": 0}, "eval_samples=0"),
        (RecoveryConfig, {"rank": 5, "targets": "router"}, "targets='router'"),
        (RecoveryConfig, {"alpha": 5.0, "targets": "experts"}, None),
        (RecoveryConfig, {"temperature": 1.23}, "distillation_weight=0.0"),
        (RecoveryConfig, {"temperature": 1.24, "distillation_weight": 0.5}, None),
        (HeaprConfig, {"eval_samples": 0}, None),
    ],
)
def test_options_without_use_are_said_once(config_class, options, said, heapr_log):
    config = config_class(**options)
    for _ in range(2):
        assert config_class.checked(config) is config
    name, value = next(iter(options.items()))
    expected = [f"{name}={value!r}: has no use with {said}"] if said else []
    assert [record.getMessage() for record in heapr_log.records] == expected


@pytest.mark.parametrize("config_class", [HeaprConfig, RecoveryConfig])
def test_what_options_need_are_options(config_class):
    options = {option.name: option for option in dataclasses.fields(config_class)}
    needs = [*config_class.NEEDS.items()]
    assert needs and options.keys() >= {name for option, others in needs for name in (option, *others)}
    for others in config_class.NEEDS.values():
        for name, values in others.items():
            assert {*values} <= {*(options[name].metadata["choices"] or (True,))}


def test_an_option_that_one_of_several_values_needs_has_a_use(heapr_log):
    config = HeaprConfig(ridge=0.0125, criterion="obs")
    HeaprConfig.checked(config, varied={"criterion": ["heapr", "obs"]})
    assert not heapr_log.records
    HeaprConfig.checked(config, varied={"criterion": ["heapr", "fisher"]})
    expected = "ridge=0.0125: has no use with criterion='heapr' and criterion='fisher' and compensate=False"
    assert [record.getMessage() for record in heapr_log.records] == [expected]


def test_changes_without_use_are_said_before_anything_is_measured(heapr_log):
    pruner = HeaprPruner(tiny_model())
    with pytest.raises(HeaprError, match="dataset"):
        pruner.prune(ridge=0.0126)
    line = "ridge=0.0126: has no use with criterion='heapr' and compensate=False"
    assert line in [record.getMessage() for record in heapr_log.records]


def test_a_saved_config_with_an_option_without_use_is_read(heapr_log):
    values = {"ridge": 0.0127, "reduction": "total", "criterion": "magnitude"}
    assert HeaprConfig.from_artefact(values).ridge == 0.0127 and not heapr_log.records
