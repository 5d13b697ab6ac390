# Licensed under the Apache License, Version 2.0
"""Every mistake that can be foreseen: one line on stderr that names the value, status 2, and nothing left behind."""

import json

import pytest

from tests.cli.conftest import listing
from tests.cli.errors import artefacts, commands, models, options, outputs, quantized, texts  # noqa: F401 (they fill the table)
from tests.cli.errors.table import EARLY, MISTAKES, check, without_estimate
from tests.processes import start_python


def test_there_are_more_than_a_hundred():
    assert len(MISTAKES) > 100


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, run, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, named = MISTAKES[name](inputs, tmp_path)
    before, inputs_before = listing(tmp_path), listing(inputs.model.parent)
    # To root every folder looks writable; only writing tells.
    check(run(*arguments), arguments[0], named, late=name == "output_that_cannot_be_made")
    assert listing(tmp_path) == before and listing(inputs.model.parent) == inputs_before


def test_mistakes_that_are_found_before_the_work(run, inputs, tmp_path, monkeypatch):
    """Hours of calibration must not be lost to a typing mistake, nor the minutes that loading takes."""
    from optimum_heapr.checkpoints import loading

    monkeypatch.setattr(loading, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    for name in EARLY:
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
    lines = []
    for name in names:
        (tmp_path / name).mkdir()
        lines.append([str(argument) for argument in MISTAKES[name](inputs, tmp_path / name)[0]])
    before = listing(tmp_path)
    code = (
        "import json, sys\nfrom optimum.commands.optimum_cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n    sys.argv = ['optimum-cli', 'heapr', *arguments]\n"
        "    try:\n        main()\n    except SystemExit as exit:\n        print(exit.code)\n"
    )
    output, error = start_python(code, json.dumps(lines)).communicate()
    assert without_estimate(output).split() == ["2"] * len(names), error
    assert len(error.splitlines()) == len(names), error
    for command, line in zip(lines, error.splitlines()):
        assert line.startswith(f"optimum-cli heapr {command[0]}: error: ")
    assert listing(tmp_path) == before
