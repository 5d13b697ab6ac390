# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr merge`."""

from optimum_heapr.calibration.statistics import AtomicStatistics


def test_merge_adds_and_plans(run, inputs, tmp_path):
    second, merged = tmp_path / "second", tmp_path / "merged"
    options = ["-m", inputs.model, "--dataset", inputs.tokens, "--num-samples", 9, "--seq-length", 24]
    assert run("calibrate", *options, "-o", second).status == 0
    result = run("merge", inputs.statistics, second, "-o", merged)
    assert result.status == 0 and f"Statistics written to {merged}" in result.output
    assert (
        "tokens in 18 samples of" in result.output
        and f"{inputs.tokens.name} gave 50.0% of the tokens" in result.output
    )
    first, other, both = (AtomicStatistics.load(path) for path in (inputs.statistics, second, merged))
    for path, block in both.blocks.items():
        assert block.fisher_sum.equal(first.blocks[path].fisher_sum + other.blocks[path].fisher_sum)
    assert run("plan", "-s", merged, "-o", tmp_path / "plan").status == 0
    assert run("apply", "-m", inputs.model, "-p", tmp_path / "plan", "-o", tmp_path / "pruned").status == 0


def test_merge_refuses_in_one_line(run, inputs, tmp_path):
    for flags, message in (
        ([inputs.statistics, "-o", tmp_path / "m"], "1 cannot be merged"),
        ([inputs.statistics, inputs.statistics, "-o", tmp_path / "m"], "would count twice"),
        ([inputs.statistics, inputs.plan, "-o", tmp_path / "m"], "holds 'heapr_plan' data"),
        ([inputs.statistics, tmp_path / "none", "-o", tmp_path / "m"], "no such file"),
        ([inputs.statistics, inputs.plan, "-o", inputs.plan, "--overwrite"], "is the input"),
    ):
        result = run("merge", *flags)
        assert result.status == 2 and message in result.error and result.error.count("\n") == 1
    assert not list(tmp_path.iterdir())
