# Licensed under the Apache License, Version 2.0
"""What the command line says of mistakes, and how much it says at all."""

import ast
import os
import re
import signal
import subprocess
import sys

import pytest

from optimum_heapr import HeaprConfig, HeaprError
from tests.docs.pages import ROOT


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plann"], "invalid choice: 'plann'"),
        (["plan", "--rato", "0.3"], """unknown flag '--rato'; did you mean "--ratio"?"""),
        (["plan", "--crterion=obs"], """unknown flag '--crterion'; did you mean "--criterion"?"""),
        (["plan", "--zzz"], "unknown flag '--zzz'; --help says what there is"),
        (["plan", "--ratio", "half"], "'half' is not a number; write 0.25, 25%, 8000000 or 8M"),
    ],
)
def test_mistakes_are_one_line_with_the_nearest(arguments, expected, inputs, run):
    statistics = ["-s", inputs.statistics] if arguments[0] == "plan" else []
    result = run(*arguments, *statistics)
    assert result.status == 2 and expected in result.error and result.error.count("\n") == 1
    if arguments == ["plann"]:
        assert result.error.endswith('did you mean "plan"?\n')


def test_version(run):
    from importlib.metadata import version

    result = run("--version")
    assert result.status == 0 and result.output == version("optimum-heapr") + "\n"


def test_bash_completes_commands_and_flags(tmp_path):
    """By a script that shtab makes of the parser, in a bash of its own."""
    shtab = pytest.importorskip("shtab", reason="needs the extra completion: pip install 'optimum-heapr[completion]'")
    from optimum_heapr.cli.completion import parser

    (tmp_path / "script").write_text(shtab.complete(parser(), "bash"))
    commands = """
        source ./script
        completed() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_optimum_cli; echo "${COMPREPLY[@]}"; }
        completed optimum-cli he; completed optimum-cli heapr pl; completed optimum-cli heapr plan --crit
    """
    found = subprocess.run(["bash", "-c", commands], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["heapr", "plan", "--criterion"]


def test_numbers_are_read_as_people_write_them(inputs, run):
    plain = run("plan", "-s", inputs.statistics, "--ratio", 0.5, "--dry-run")
    assert run("plan", "-s", inputs.statistics, "--ratio", "50%", "--dry-run") == plain
    assert HeaprConfig(target_parameters="8M").target_parameters == 8_000_000
    assert HeaprConfig.from_dict({"ratio": "12.5%", "num_samples": "2k"}).ratio == 0.125


def test_quiet_prints_errors_alone(inputs, run, tmp_path):
    result = run("plan", "-s", inputs.statistics, "-o", tmp_path / "plan.safetensors", "--quiet")
    assert result.status == 0 and result.output == result.error == "" and (tmp_path / "plan.safetensors").exists()
    assert run("frontier", "-s", inputs.statistics, "--ratios", "0.5", "--json", "-q").output.startswith("{")
    assert "--width-multiple" in run("plan", "-s", inputs.statistics, "-q", "--width-multiple", 99).error


def test_a_reader_that_has_enough_is_no_error(inputs):
    """As `head`; the pipe is closed before anything is written to it."""
    line = (
        f"{sys.executable} -m optimum.commands.optimum_cli heapr inspect {inputs.pruned}/heapr/report.json {{}} | true"
    )
    for flag in ("", "--json"):
        command = f"{line.format(flag)}; exit ${{PIPESTATUS[0]}}"
        found = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert found.returncode == 128 + signal.SIGPIPE and found.stderr == ""


def test_sigterm_says_what_ctrl_c_says(inputs, run, monkeypatch, tmp_path):
    from optimum_heapr import PruningPlan

    def killed(self, path):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PruningPlan, "save", killed)
    before = signal.getsignal(signal.SIGTERM)
    result = run("plan", "-s", inputs.statistics, "-o", tmp_path / "plan.safetensors")
    assert result.status == 128 + signal.SIGTERM
    assert result.error == "optimum-cli heapr plan: interrupted; nothing half-written was left behind\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_messages_name_flags_and_in_python_arguments(inputs, run):
    """They are written once, as Python raises or logs them."""
    refused = "compensation_scope='block': set compensate=True, or leave the scope out"
    with pytest.raises(HeaprError, match=re.escape(refused)):
        HeaprConfig(compensation_scope="block")
    result = run("plan", "-s", inputs.statistics, "--compensation-scope", "block")
    assert result.error.endswith("--compensation-scope block: set --compensate, or leave the scope out\n")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("layout='uniform': not 'num_samples' of num_samples", "--layout uniform: not 'num_samples' of --num-samples"),
        ("output='/a/num_samples/x y': pass overwrite=True", "--output '/a/num_samples/x y': pass --overwrite"),
        ("packing=False: dataset=None, min_width=-1, (ratio=nan)", "--no-packing: --dataset, --min-width -1, (--ratio nan)"),
        ("prompts: it's no text; use HeaprPruner.plan()", "--prompt: it's no text; use `optimum-cli heapr prune --dry-run`"),
        ("state='a.state': resume=True; not eager_mode=3 or a_b", "state a.state: --resume; not eager_mode=3 or a_b"),
        ("in out/seq_length.x, with model_type='qwen3_moe'", "in out/seq_length.x, with model_type='qwen3_moe'"),
    ],
)  # fmt: skip
def test_what_arguments_are_on_the_command_line(message, expected):
    from optimum_heapr.cli.completion import parser
    from optimum_heapr.cli.wording import in_flags

    words = parser()
    for name in ("heapr", "prune"):
        words = words._subparsers._group_actions[0].choices[name]
    assert in_flags(message, words) == expected


def test_only_the_command_line_writes_flags():
    """What the rest raises or logs must make sense in Python; the commands turn it into flags."""
    launchers = {"optimum_heapr/calibration/processes.py": "accelerate launch --multi_gpu --num_processes N"}
    for path in sorted((ROOT / "optimum_heapr").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("optimum_heapr/cli/", "optimum_heapr/serving/")):
            continue
        code = ast.parse(path.read_text(encoding="utf-8").replace(launchers.get(name, "\0"), ""))
        for call in ast.walk(code):
            if isinstance(call, ast.Call) and re.search(r"(HeaprError|warning|info)$", ast.unparse(call.func)):
                assert not re.search(r"\s\(?--[a-z]", ast.unparse(call)), f"{name}:{call.lineno}"


def test_a_plan_from_statistics_alone_measures_nothing(inputs, run):
    result = run("plan", "-s", inputs.statistics, "--max-loss-increase", "0.02")
    assert result.status == 2 and result.error == (
        "optimum-cli heapr plan: error: --max-loss-increase 0.02: is measured with the model, and a plan from statistics alone has "
        "none; use `optimum-cli heapr prune --dry-run` with these statistics, or see what each ratio costs with `optimum-cli heapr "
        "frontier`\n"
    )
    assert "--max-loss-increase" not in run("plan", "--help").output
