# Licensed under the Apache License, Version 2.0
"""`prune --strict`: a model whose loss jumped is not written."""

import json

import pytest
import torch

from optimum_heapr import HeaprConfig, HeaprError, HeaprPruner, PruningPlan
from optimum_heapr.report.jump import refuse_jump
from tests.helpers import random_ids, tiny_model


TEXT = ("--eval-dataset", "demo", "--eval-samples", 5, "--seq-length", 96)


@pytest.fixture(scope="module")
def lying(tmp_path_factory):
    """Statistics of the demonstration model that say of one layer that it does nothing."""
    path = tmp_path_factory.mktemp("lying") / "statistics.safetensors"
    pruner = HeaprPruner.from_pretrained("demo", HeaprConfig(dataset="demo", num_samples=8, seq_length=96))
    statistics = pruner.calibrate()
    statistics.blocks["model.layers.1.mlp.experts"].activation_sq_sum *= 1e-9
    statistics.save(path)
    return path


def test_a_jump_is_said_in_the_report_and_refused_if_that_is_asked_for(lying, run, tmp_path):
    flags = ("prune", "-m", "demo", "-s", lying, "--dtype", "float32", *TEXT)
    refused = run(*flags, "-o", tmp_path / "refused", "--strict")
    assert refused.status == 2 and not (tmp_path / "refused").exists()
    (line,) = [line for line in refused.error.splitlines() if "error:" in line]
    for part in ("--strict: the loss rose by +", "model.layers.1 did it", "--protect 'model.layers.1.*'"):
        assert part in line

    written = run(*flags, "-o", tmp_path / "written")
    assert written.status == 0 and "model.layers.1 did it" in written.error
    folder = tmp_path / "written" / "heapr"
    found = json.loads((folder / "report.json").read_text())["loss"]["jump"]
    assert found["layer"] == "model.layers.1" and found["restored"] < 0.25 * found["increase"]
    for name in ("report.md", "report.html"):
        assert "Look at this before you use it: the loss rose by" in (folder / name).read_text()
    assert "model.layers.1 did it" in (tmp_path / "written" / "README.md").read_text()


TOKEN, BLOCK, EXPERT, ATOM = 7, "model.layers.1.mlp.experts", 2, 5


@torch.no_grad()
def with_super_atom():
    """A model in which one atomic expert keeps what a token writes into the first coordinate from the head, for which it is the wrong
    answer; nothing else reads or writes that coordinate. Only that token wakes it."""
    model, strength = tiny_model(), 4.0
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[0] = 1
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate):
            projection.weight[:, 0] = 0
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.experts.gate_up_proj[..., 0] = 0
        layer.mlp.experts.down_proj[:, 0] = 0
    model.model.embed_tokens.weight[:, 0] = 0
    model.model.embed_tokens.weight[TOKEN, 0] = strength
    model.model.norm.weight[0] = 1
    model.lm_head.weight[:, 0] = 0
    model.lm_head.weight[0, 0] = 6  # token 0 would follow

    experts, seen = (
        model.get_submodule(BLOCK),
        model.config.hidden_size**0.5,
    )  # where one coordinate outweighs all others
    model.model.layers[1].mlp.gate.weight[EXPERT, 0] = 10  # who is woken has all of the router's weight
    width = experts.down_proj.shape[2]
    experts.gate_up_proj[EXPERT, [ATOM, width + ATOM]] = 0
    experts.gate_up_proj[EXPERT, [ATOM, width + ATOM], 0] = 1
    experts.down_proj[EXPERT, :, ATOM] = 0
    experts.down_proj[EXPERT, 0, ATOM] = -strength / seen**2  # of silu(seen) seen
    return model


@pytest.mark.parametrize("shown", [False, True], ids=["unseen", "seen"])
def test_one_atomic_expert_that_ruins_the_model_is_found_by_measuring(shown, run, tmp_path):
    """Text without the token says that it does nothing: it goes first, at no cost. Text with it keeps it."""
    with_super_atom().save_pretrained(tmp_path / "model")
    without = random_ids(24, 48)
    without[without == TOKEN] += 1
    woken = without.clone()
    woken[:, ::4] = TOKEN
    for name, rows in (("text", woken if shown else without), ("measured", woken[:6])):
        lines = (json.dumps({"input_ids": row}) + "\n" for row in rows.tolist())
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    flags = ["-m", tmp_path / "model", "--dataset", tmp_path / "text.jsonl", "--num-samples", 24, "--seq-length", 48]
    flags += ["--eval-dataset", tmp_path / "measured.jsonl", "--eval-samples", 6, "--ratio", 0.1]
    result = run("prune", *flags, "--strict", "-o", tmp_path / "strict")
    if shown:
        assert result.status == 0, result.error
        assert ATOM in PruningPlan.load(tmp_path / "strict").kept[BLOCK][EXPERT]
        return
    assert result.status == 2 and not (tmp_path / "strict").exists()
    assert "--strict: the loss rose by +" in result.error and "model.layers.1 did it" in result.error
    assert run("prune", *flags, "-o", tmp_path / "written").status == 0
    assert ATOM not in PruningPlan.load(tmp_path / "written").kept[BLOCK][EXPERT]
    assert "model.layers.1 did it" in (tmp_path / "written" / "heapr" / "report.md").read_text()


def test_what_is_sane_is_written(inputs, run, tmp_path):
    flags = ("-m", inputs.model, *inputs.calibration, "--eval-samples", 2, "--strict")
    assert run("prune", *flags, "-o", tmp_path / "pruned").status == 0
    assert (tmp_path / "pruned" / "config.json").is_file()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--eval-samples", 0], "--strict: looks at what is measured, and --eval-samples 0 measures nothing"),
        (["--dry-run"], "--strict: looks at what is measured, and a dry run measures nothing"),
        (["--memory", "streaming"], "--strict: looks at what is measured with the model in memory"),
    ],
)
def test_what_would_not_be_measured_is_refused_before_work_is_spent(flags, expected, inputs, run, tmp_path):
    result = run("prune", "-m", inputs.model, *inputs.calibration, "--strict", *flags, "-o", tmp_path / "pruned")
    assert result.status == 2 and expected in result.error and not (tmp_path / "pruned").exists()


def test_statistics_without_text_to_measure_on_are_refused(inputs, run, tmp_path):
    result = run("prune", "-m", inputs.model, "-s", inputs.statistics, "--strict", "-o", tmp_path / "pruned")
    assert result.status == 2 and "--strict: nothing was measured" in result.error
    assert not (tmp_path / "pruned").exists()


def test_why_a_loss_was_not_measured_is_said():
    problem = (
        "after: loss: HeaprError: loss=nan: not finite in window 0 of 'text'; load the model in bfloat16 or float32"
    )
    with pytest.raises(
        HeaprError, match=r"^strict=True: nothing was measured .* \(after: loss: .*nan: not finite"
    ) as error:
        refuse_jump({"loss": {}, "problems": ["before: speed: OSError: none", problem]})
    assert "eval_dataset" not in str(error.value)
