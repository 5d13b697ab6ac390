# Licensed under the Apache License, Version 2.0
"""What `--push-to-hub` refuses before any work is done; that it works is shown in `tests/hub`."""

import pytest


@pytest.mark.parametrize("command", ["prune", "apply"])
def test_private_is_about_a_repository(command, run, inputs, tmp_path):
    plan = ["--plan", inputs.plan] if command == "apply" else inputs.calibration
    result = run(command, "-m", inputs.model, *plan, "-o", tmp_path / "out", "--private")
    assert result.status == 2 and "name one with --push-to-hub" in result.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, step", [("me/model", "log in with `hf auth login`"), ("a/b/c", "use NAME or OWNER/NAME")]
)
def test_a_push_that_cannot_work_is_refused_first(name, step, run, inputs, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    result = run("apply", "-m", inputs.model, "-p", inputs.plan, "-o", tmp_path / "out", "--push-to-hub", name)
    assert result.status == 2 and result.error.count("\n") == 1
    assert f"--push-to-hub {name}: " in result.error and step in result.error
    assert not (tmp_path / "out").exists()
