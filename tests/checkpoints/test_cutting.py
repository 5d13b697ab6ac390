# Licensed under the Apache License, Version 2.0
"""Streaming apply: the same files, byte for byte, without the memory of the model."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import optimum_heapr.checkpoints.cutting as streaming
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.calibration.streaming import calibrate_streaming
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.checkpoints.saving import apply_streaming
from optimum_heapr.families import TESTED
from optimum_heapr.layerwise.source import SourceCheckpoint
from optimum_heapr.pruner import HeaprPruner
from optimum_heapr.text.samples import CalibrationData
from optimum_heapr.utils.errors import HeaprError
from optimum_heapr.utils.tensor_files import checkpoint_files
from tests.helpers import random_samples
from tests.processes import run_python
from tests.surgery.stock_models import layout_plan, random_plan, wide_model


LAYOUTS = ("variable", "uniform", "padded")


def both_ways(source: Path, folder: Path, plan=None, layout="variable", dtype="auto", **save_options) -> int:
    """Prunes in memory and streaming, asserts that all files are equal, and returns how many weight files there are."""
    pruner = HeaprPruner.from_pretrained(source, dtype=dtype)
    plan = plan or layout_plan(pruner.model, layout)
    pruner.apply(plan)
    pruner.save_pretrained(folder / "memory", **save_options)
    apply_streaming(source, plan, folder / "stream", dtype=dtype, **save_options)
    memory = {path.relative_to(folder / "memory"): path for path in (folder / "memory").rglob("*") if path.is_file()}
    stream = {path.relative_to(folder / "stream"): path for path in (folder / "stream").rglob("*") if path.is_file()}
    assert set(stream) == set(memory)
    assert [str(name) for name in memory if stream[name].read_bytes() != memory[name].read_bytes()] == []
    return len(list((folder / "stream").glob("*.safetensors")))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", TESTED)
def test_same_bytes_as_in_memory(family, layout, tmp_path):
    if family == "hunyuan_v1_moe" and layout != "variable":
        pytest.skip("its shared MLP has the width of its experts: no stock layout")
    wide_model(family).save_pretrained(tmp_path / "source", max_shard_size="60KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    assert both_ways(tmp_path / "source", tmp_path, layout=layout, max_shard_size="50KB") > 3


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])  # the latter keeps a buffer in float32
def test_same_bytes_in_another_dtype(family, dtype, tmp_path):
    wide_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "source", max_shard_size="60KB")
    both_ways(tmp_path / "source", tmp_path, dtype=dtype, max_shard_size="30KB")


def test_same_bytes_in_one_file(tmp_path):
    wide_model("qwen3_moe").save_pretrained(tmp_path / "source")
    assert both_ways(tmp_path / "source", tmp_path, layout="uniform") == 1


def test_same_bytes_with_tied_embeddings(tmp_path):
    model = wide_model("qwen3_moe", tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    both_ways(tmp_path / "source", tmp_path, max_shard_size="60KB")


@pytest.mark.parametrize("equal", [True, False])
def test_same_bytes_and_fingerprint_where_a_tied_head_is_stored_too(equal, tmp_path):
    """As loading does, equal ones are tied, and others are not."""
    model = wide_model("qwen3_moe", tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"].clone() * (1 if equal else 2)
    save_file({**tensors, "lm_head.weight": head}, path, {"format": "pt"})

    both_ways(tmp_path / "source", tmp_path, layout="uniform")
    assert ("lm_head.weight" in load_file(tmp_path / "stream" / "model.safetensors")) == (not equal)

    data = CalibrationData(random_samples(7, 9, vocab_size=96), "random", 0, 9)
    plain = calibrate(load_model(tmp_path / "source")[0], data).fingerprint
    skeleton, _ = load_model(tmp_path / "source", skeleton=True)
    source = SourceCheckpoint(skeleton, checkpoint_files(str(tmp_path / "source")))
    assert calibrate_streaming(skeleton, source, data, tmp_path).fingerprint == plain
    assert plain["model"]["num_parameters"] == model.num_parameters() + (0 if equal else head.numel())


def test_same_bytes_with_empty_experts_and_an_empty_layer(tmp_path):
    model = wide_model("qwen3_moe")
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    plan = random_plan(model, ratio=0.3)
    first, second, _ = plan.kept
    plan.kept[first][2] = plan.kept[first][2][:0]
    plan.kept[second] = [indices[:0] for indices in plan.kept[second]]
    both_ways(tmp_path / "source", tmp_path, plan, max_shard_size="20KB")


def test_tensors_that_are_not_of_the_model_are_left_out(tmp_path):
    """Checkpoints may hold more than the model, such as layers for multi-token prediction."""
    model = wide_model("qwen3_moe")
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    save_file({**load_file(path), "model.mtp.weight": torch.ones(3)}, path, {"format": "pt"})
    both_ways(tmp_path / "source", tmp_path, layout="uniform")
    assert "model.mtp.weight" not in load_file(tmp_path / "stream" / "model.safetensors")


def test_model_in_the_hub_cache(tmp_path):
    """A snapshot in the cache, which is found without a network: files are links to blobs, named by a commit."""
    commit = "0" * 40
    repository = tmp_path / "cache" / "models--me--tiny"
    model = wide_model("qwen3_moe")
    model.save_pretrained(repository / "snapshots" / commit, max_shard_size="60KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    plan = layout_plan(model, "uniform")
    options = {"cache_dir": str(tmp_path / "cache"), "revision": "main"}
    apply_streaming("me/tiny", plan, tmp_path / "hub", max_shard_size="50KB", **options)
    apply_streaming(repository / "snapshots" / commit, plan, tmp_path / "folder", max_shard_size="50KB")
    for path in (tmp_path / "folder").rglob("*.*"):
        if path.name in (
            "tokenizer_config.json",
            "README.md",
            "report.json",
            "report.md",
            "report.html",
            "files.json",
        ):
            continue  # say where the model was read from
        assert (tmp_path / "hub" / path.relative_to(tmp_path / "folder")).read_bytes() == path.read_bytes()


class TestRefusals:
    @pytest.fixture()
    def source(self, tmp_path):
        wide_model("qwen3_moe").save_pretrained(tmp_path / "source", max_shard_size="60KB")
        return tmp_path / "source"

    def test_plan_of_another_model_of_the_same_shape(self, source, tmp_path):
        model = wide_model("qwen3_moe")
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[0, :, 0] += 1.0
        plan = layout_plan(model, "uniform")
        with pytest.raises(HeaprError, match="plan: made for a model with experts"):
            apply_streaming(source, plan, tmp_path / "pruned")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]

    def test_plan_of_another_architecture(self, source, tmp_path):
        plan = layout_plan(wide_model("mixtral"), "uniform")
        with pytest.raises(HeaprError, match="plan: "):
            apply_streaming(source, plan, tmp_path / "pruned")

    def test_checkpoint_that_lacks_a_tensor(self, source, tmp_path):
        plan = layout_plan(wide_model("qwen3_moe"), "uniform")
        index = json.loads((source / "model.safetensors.index.json").read_text())
        file = source / index["weight_map"]["model.norm.weight"]
        tensors = load_file(file)
        del tensors["model.norm.weight"]
        save_file(tensors, file, {"format": "pt"})
        del index["weight_map"]["model.norm.weight"]
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(
            HeaprError, match=r"its checkpoint lacks 1 of its tensors: model\.norm\.weight; download it again"
        ):
            apply_streaming(source, plan, tmp_path / "pruned")

    def test_checkpoint_without_safetensors(self, source, tmp_path):
        for path in source.glob("model*"):
            path.unlink()
        torch.save(wide_model("qwen3_moe").state_dict(), source / "pytorch_model.bin")
        with pytest.raises(HeaprError, match=r"has no model\.safetensors; only safetensors can be cut file by file"):
            apply_streaming(source, layout_plan(wide_model("qwen3_moe"), "uniform"), tmp_path / "pruned")

    def test_output_that_is_not_empty(self, source, tmp_path):
        (tmp_path / "pruned").mkdir()
        (tmp_path / "pruned" / "mine.txt").write_text("kept")
        plan = layout_plan(wide_model("qwen3_moe"), "uniform")
        with pytest.raises(HeaprError, match="folder is not empty"):
            apply_streaming(source, plan, tmp_path / "pruned")
        assert [path.name for path in (tmp_path / "pruned").iterdir()] == ["mine.txt"]


def test_interrupted_run_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    model = wide_model("qwen3_moe")
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    plan = layout_plan(model, "uniform")
    write, calls = streaming.write_tensors, []

    def killed_at_the_third_file(path, *args):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(path, *args)

    monkeypatch.setattr(streaming, "write_tensors", killed_at_the_third_file)
    with pytest.raises(KeyboardInterrupt):
        apply_streaming(tmp_path / "source", plan, tmp_path / "pruned", max_shard_size="50KB")
    assert len(calls) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    monkeypatch.undo()
    apply_streaming(tmp_path / "source", plan, tmp_path / "pruned", max_shard_size="50KB")
    assert (tmp_path / "pruned" / "model.safetensors.index.json").is_file()


KILLED = """
import os, signal, sys
from optimum_heapr.planning.plan import PruningPlan
from optimum_heapr.checkpoints.saving import apply_streaming
from optimum_heapr.checkpoints.cutting import TargetCheckpoint
parts, calls = TargetCheckpoint.parts, []
def killed(self, name):
    calls.append(name)
    if len(calls) == 60:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from parts(self, name)
TargetCheckpoint.parts = killed
plan, source, output = sys.argv[1:]
apply_streaming(source, PruningPlan.load(plan), output, max_shard_size="50KB")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no such signal here")
def test_a_run_that_was_killed_within_a_file_can_be_repeated(tmp_path):
    """It leaves a temporary folder, which the next run removes; that gives the bytes of a run that was not killed."""
    model = wide_model("qwen3_moe")
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    plan = layout_plan(model, "variable")
    plan.save(tmp_path / "plan")
    arguments = [tmp_path / "plan", tmp_path / "source", tmp_path / "pruned"]
    done = run_python(KILLED, *arguments, has="package")
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    (left,) = [path for path in tmp_path.iterdir() if path.name not in ("plan", "source")]
    written = sorted(left.glob("*.safetensors"))
    assert left.name.startswith(".pruned.") and len(written) > 1
    with pytest.raises(SafetensorError):
        load_file(written[-1])  # it was within this file

    for name in ("pruned", "whole"):
        apply_streaming(tmp_path / "source", plan, tmp_path / name, max_shard_size="50KB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan", "pruned", "source", "whole"]
    pruned, whole = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("pruned", "whole")
    )
    assert pruned == whole


MEASURE = """
import sys
from pathlib import Path
import torch
from optimum_heapr.pruner import HeaprPruner
from optimum_heapr.checkpoints.saving import apply_streaming
from optimum_heapr.planning.plan import PruningPlan
import optimum_heapr.checkpoints.cutting, transformers.models.qwen3_moe.modeling_qwen3_moe
plan, source, output, way = sys.argv[1:]
def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(status.partition(field + ":")[2].split()[0]) * 1024
def prune(source, plan, output):
    if way == "stream":
        apply_streaming(source, plan, output, max_shard_size="8MB")
    else:
        pruner = HeaprPruner.from_pretrained(source)
        pruner.apply(PruningPlan.load(plan))
        pruner.save_pretrained(output, max_shard_size="8MB")
# The first run, of a tiny model, imports and allocates whatever is needed for any size.
prune(source + "-tiny", plan + "-tiny", output + "-tiny")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
prune(source, plan, output)
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_below_two_shards(tmp_path):
    shard = 8_000_000
    for name, changes in (("", {"hidden_size": 256, "num_experts": 24, "vocab_size": 4000}), ("-tiny", {})):
        model = wide_model("qwen3_moe", 256 if changes else 32, **changes)
        model.save_pretrained(f"{tmp_path}/source{name}", max_shard_size=shard)
        random_plan(model, ratio=0.3).save(f"{tmp_path}/plan{name}")
    size = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
    assert size > 6 * shard

    def peak(way: str) -> int:
        arguments = [tmp_path / "plan", tmp_path / "source", tmp_path / way, way]
        done = run_python(MEASURE, *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
        return int(done.stdout)

    streamed, in_memory = peak("stream"), peak("memory")
    print(
        f"checkpoint {size / 1e6:.0f} MB, peak {streamed / 1e6:.1f} MB streaming, {in_memory / 1e6:.1f} MB in memory"
    )
    assert streamed < 2 * shard
    assert in_memory > size / 2  # the measure would see it
