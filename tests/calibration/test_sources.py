# Licensed under the Apache License, Version 2.0
"""Sums by source: of a mixture, each source has what a calibration on its samples alone gives, however they are summed."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from optimum_heapr import HeaprError
from optimum_heapr.calibration import runner
from optimum_heapr.calibration.merging import merge_statistics
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.calibration.state import StateFile
from optimum_heapr.calibration.statistics import SUMMED_BY_SOURCE, AtomicStatistics
from optimum_heapr.calibration.streaming import calibrate_streaming
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.layerwise.source import SourceCheckpoint
from optimum_heapr.text.samples import CalibrationData
from optimum_heapr.utils.tensor_files import checkpoint_files
from tests.helpers import random_samples, tiny_model
from tests.ranks import Ranks


ORIGINS = ["b", "a", "c", "a", "b", "a", "a"]
LENGTHS = (9, 7, 8, 5, 9, 6, 4)


def mixture() -> CalibrationData:
    return CalibrationData(random_samples(*LENGTHS), "a,b,c", 0, 9, list(ORIGINS))


def of_source(name: str) -> CalibrationData:
    samples = [sample for sample, origin in zip(mixture().samples, ORIGINS) if origin == name]
    return CalibrationData(samples, name, 0, 9)


def assert_sums_of_sources(statistics: AtomicStatistics, alone: list[AtomicStatistics], rtol: float = 1e-9) -> None:
    """Compares the sums of each source with a calibration on it alone, and their sum with the totals."""
    assert len(statistics.sources) == len(alone)
    for path, block in statistics.blocks.items():
        found = statistics.by_source(path)
        for name in SUMMED_BY_SOURCE:
            for mine, other in zip(found, alone):
                torch.testing.assert_close(getattr(mine, name), getattr(other.blocks[path], name), rtol=rtol, atol=0)
            total = sum(getattr(source, name) for source in found)
            torch.testing.assert_close(getattr(block, name), total, rtol=rtol, atol=0)


@pytest.fixture(scope="module")
def alone():
    return [calibrate(tiny_model(dtype=torch.float64), of_source(name)) for name in "abc"]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("gram", [False, True])
def test_sources_are_summed_apart_in_one_pass(alone, batch_size, gram):
    statistics = calibrate(tiny_model(dtype=torch.float64), mixture(), batch_size, gram)
    assert [source["name"] for source in statistics.sources] == ["a", "b", "c"]
    assert_sums_of_sources(statistics, alone)
    if gram:  # matrices are those of all tokens
        whole = CalibrationData(mixture().samples, "all", 0, 9)
        one = calibrate(tiny_model(dtype=torch.float64), whole, gram=True)
        for path, block in one.blocks.items():
            assert block.source_token_count is None and one.by_source(path) == [block]
            torch.testing.assert_close(statistics.blocks[path].activation_gram_sum, block.activation_gram_sum)


def test_a_micro_batch_is_of_one_source_and_they_stay_mixed():
    batches = list(mixture().micro_batches(2))
    assert [batch["sample_index"].tolist() for batch in batches] == [[0, 4], [1, 3], [2], [5, 6]]
    assert [int(batch["source"]) for batch in batches] == [1, 0, 2, 0]
    one = CalibrationData(mixture().samples, "all", 0, 9)
    assert [batch["sample_index"].tolist() for batch in one.micro_batches(4)] == [[0, 1, 2, 3], [4, 5, 6]]


def test_an_interrupted_run_goes_on(alone, tmp_path, monkeypatch):
    model, path, measured = tiny_model(dtype=torch.float64), tmp_path / "state", []
    add = runner._Measuring.add

    def interrupts(self, *args):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(args)
        add(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner._Measuring, "add", interrupts)
        calibrate(model, mixture(), state=StateFile(path, save_every=1))
    assert_sums_of_sources(calibrate(model, mixture(), state=StateFile(path, resume=True)), alone)
    # A state in which sources were added up, as earlier versions wrote it.
    calibrate(model, CalibrationData(mixture().samples, "a,b,c", 0, 9), state=StateFile(tmp_path / "earlier"))
    with pytest.raises(HeaprError, match="by_source was null, is true"):
        calibrate(model, mixture(), state=StateFile(tmp_path / "earlier", resume=True))


def test_what_is_left_out_is_left_out_of_its_source(monkeypatch):
    model, look = tiny_model(dtype=torch.float64), runner.what_is_not_finite
    seen = []

    def third_is_not_finite(accumulators):
        seen.append(1)
        return "gradients" if len(seen) == 3 else look(accumulators)  # micro-batch 2, the only one of source c

    with monkeypatch.context() as patch:
        patch.setattr(runner, "what_is_not_finite", third_is_not_finite)
        statistics = calibrate(model, mixture(), 1, skip_nonfinite=True)
    assert [source["num_samples"] for source in statistics.sources] == [4, 2, 0]
    assert [source["num_tokens"] for source in statistics.sources] == [22, 18, 0]
    for path in statistics.blocks:
        first, second, third = statistics.by_source(path)
        assert int(third.token_count.sum()) == 0 and float(third.fisher_sum.sum()) == 0
        assert int(first.token_count.sum()) == 2 * 22 and int(second.token_count.sum()) == 2 * 18


def test_merged_statistics_have_the_sources_of_all_parts(alone):
    model = tiny_model(dtype=torch.float64)
    samples, origins = mixture().samples, ORIGINS
    first = calibrate(model, CalibrationData(samples[:3], "a,b,c", 0, 9, origins[:3]))
    second = calibrate(model, CalibrationData([s for s, o in zip(samples[3:], origins[3:]) if o == "a"], "a", 0, 9))
    merged = merge_statistics([first, second])
    assert [source["name"] for source in merged.sources] == ["a", "b", "c", "a"]
    for path, block in merged.blocks.items():
        a, _, _, further = merged.by_source(path)
        for name in SUMMED_BY_SOURCE:
            whole = getattr(alone[0].blocks[path], name)
            torch.testing.assert_close(getattr(a, name) + getattr(further, name), whole)
            assert getattr(block, f"source_{name}").shape[1] == 4
    earlier = dataclasses.replace(first, blocks={path: without_sources(b) for path, b in first.blocks.items()})
    for path in merge_statistics([earlier, second]).blocks:
        assert merge_statistics([earlier, second]).by_source(path) is None


def without_sources(block):
    return dataclasses.replace(block, **{f"source_{name}": None for name in SUMMED_BY_SOURCE})


def test_a_file_keeps_them_and_one_of_an_earlier_version_has_none(tmp_path):
    path = tmp_path / "statistics.safetensors"
    statistics = calibrate(tiny_model(dtype=torch.float64), mixture())
    statistics.save(path)
    assert AtomicStatistics.load(path).blocks == statistics.blocks
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    assert metadata["version"] == "1"  # which earlier versions read, without the sums that they do not know
    save_file({name: part for name, part in tensors.items() if ".source_" not in name}, path, metadata)
    loaded = AtomicStatistics.load(path)
    assert all(loaded.by_source(block) is None for block in loaded.blocks)

    document = json.loads(metadata["document"])
    document["fingerprint"]["data"]["sources"].pop()
    save_file(tensors, path, {**metadata, "document": json.dumps(document)})
    with pytest.raises(HeaprError, match=r"source_\w+ has shape \(6, 3"):
        AtomicStatistics.load(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone_in_float32(folder):
    return [calibrate(load_model(folder)[0], of_source(name)) for name in "abc"]


def streamed(skeleton, work, **options):
    source = SourceCheckpoint(skeleton, checkpoint_files(skeleton.config._name_or_path))
    work.mkdir(exist_ok=True)
    return calibrate_streaming(skeleton, source, mixture(), work, **options)


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_layer_by_layer(folder, alone_in_float32, tmp_path, skip_nonfinite):
    skeleton, _ = load_model(folder, skeleton=True)
    statistics = streamed(skeleton, tmp_path / "work", batch_size=2, skip_nonfinite=skip_nonfinite)
    assert_sums_of_sources(statistics, alone_in_float32, rtol=1e-4)


@pytest.mark.parametrize("mode", ["plain", "streaming"])
def test_two_processes(folder, alone_in_float32, tmp_path, monkeypatch, mode):
    ranks = Ranks(monkeypatch)
    # Loading sets the default dtype for a while, which threads share.
    models = [load_model(folder, skeleton=mode == "streaming")[0] for _ in range(ranks.number)]

    def measure(rank):
        if mode == "plain":
            return calibrate(models[rank], mixture())
        return streamed(models[rank], tmp_path / str(rank))

    for statistics in ranks.run(measure):
        assert_sums_of_sources(statistics, alone_in_float32, rtol=1e-4)
