# Licensed under the Apache License, Version 2.0
"""What several processes measured layer by layer is added once, whenever they are killed and however often."""

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from optimum_heapr.calibration import adding, streaming
from optimum_heapr.calibration.layer_state import LayerProgress, LayerState, StateFolder
from optimum_heapr.calibration.statistics import AtomicStatistics
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.checkpoints.streamed import StreamedCheckpoint
from optimum_heapr.configuration import HeaprConfig
from optimum_heapr.layerwise import memory
from optimum_heapr.layerwise.walk import LayerWalk
from optimum_heapr.utils.errors import HeaprError
from tests.helpers import assert_same_statistics, calibration_data, tiny_model
from tests.ranks import Ranks


DATA = (8, 5, 7)  # rank 0 has two of three micro-batches
TOP_K = 2
CONFIG = HeaprConfig(criterion="obs", batch_size=1)


class Killed(BaseException):
    """No error that anything may catch."""


class Work:
    """A model and the folder that its calibration by two ranks is saved in."""

    def __init__(self, folder: Path, ranks: Ranks):
        self.folder, self.ranks = folder, ranks
        tiny_model().save_pretrained(folder / "model")
        # Loading sets the default dtype for a while, which threads share.
        self.models = [load_model(folder / "model", skeleton=True)[0] for _ in range(ranks.number)]

    def state(self, rank: int) -> Path:
        return self.folder / ("state" if rank == 0 else f"state.{rank}")

    def calibrate(self, rank: int) -> AtomicStatistics:
        state = StateFolder.__new__(StateFolder)  # its rank is that of the process
        state.path = self.state(rank)
        return StreamedCheckpoint(self.models[rank], None, {}).calibrate(calibration_data(*DATA), CONFIG, state)

    def run(self) -> list[AtomicStatistics]:
        return self.ranks.run(self.calibrate)


@pytest.fixture
def work(tmp_path, monkeypatch):
    return Work(tmp_path, Ranks(monkeypatch))


@pytest.fixture
def kill_at(monkeypatch):
    """Sets before which change of the disk, while sums are added, rank 0 is killed; counts those that are made."""
    at, here = {"step": None, "seen": 0}, threading.local()

    def counted(function):
        def changes(*arguments, **options):
            if getattr(here, "adding", False):
                at["seen"] += 1
                if at["seen"] - 1 == at["step"]:
                    raise Killed
            return function(*arguments, **options)

        return changes

    def adds(accelerator, *arguments):
        here.adding = accelerator.is_main_process
        try:
            return adding.add_parts(accelerator, *arguments)
        finally:
            here.adding = False

    monkeypatch.setattr(streaming, "add_parts", adds)
    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))

    def set_step(step):
        at.update(step=step, seen=0)
        return at

    return set_step


def assert_same(actual, expected):
    """Sums bit for bit; what is made of them as well, up to rounding."""
    assert actual.fingerprint == expected.fingerprint and list(actual.blocks) == list(expected.blocks)
    for path, block in expected.blocks.items():
        for name, tensor in block.sums.items():
            assert torch.equal(actual.blocks[path].sums[name], tensor), f"{path}.{name}"
        eps = torch.finfo(torch.float32).eps * block.width**2
        torch.testing.assert_close(actual.blocks[path].removal_cost, block.removal_cost, rtol=eps, atol=0)


def assert_each_token_counts_once(statistics):
    for path, block in statistics.blocks.items():
        assert int(block.token_count.sum()) == statistics.num_tokens * TOP_K, path


def test_killed_twice_at_each_step_of_the_adding(work, kill_at, tmp_path):
    seen = kill_at(None)
    expected = work.run()
    steps = seen["seen"]
    blocks = len(expected[0].blocks)
    assert steps >= 3 * blocks, "each sum is written, marked, and its part dropped"
    assert_each_token_counts_once(expected[0])
    expected_on_disk = tmp_path / "expected"
    expected[0].save(expected_on_disk)
    expected = AtomicStatistics.load(expected_on_disk)  # not mapped from a folder that is about to go

    def fresh(measured):
        for rank in range(2):
            shutil.rmtree(work.state(rank), ignore_errors=True)
            if measured:
                shutil.copytree(tmp_path / f"measured{rank}", work.state(rank))

    fresh(measured=False)
    kill_at(0)
    with pytest.raises(Killed):
        work.run()
    for rank in range(2):  # all is measured, nothing is added
        shutil.copytree(work.state(rank), tmp_path / f"measured{rank}")
        assert not list(work.state(rank).glob("*.block.*"))

    for step in range(steps):
        fresh(measured=True)
        for _ in range(2):
            kill_at(step)
            with pytest.raises(Killed):
                work.run()
                raise Killed  # what was added before needs no step again, so the second time there may be fewer
        kill_at(None)
        first, second = work.run()
        assert_each_token_counts_once(first)
        assert_same(first, expected)
        assert_same_statistics(second, expected, rtol=0)


def test_a_finished_run_goes_on_with_or_without_the_other_folders(work):
    """The first process could not write its output; the others may or may not have their states still."""
    expected = work.run()
    folder = work.folder / "expected"
    expected[0].save(folder)
    expected = AtomicStatistics.load(folder)
    for gone in ([], [1], [0], [0, 1]):
        for rank in gone:
            shutil.rmtree(work.state(rank))
        first, second = work.run()
        assert_same(first, expected)
        assert_each_token_counts_once(second)


def test_only_the_first_process_keeps_sums(work):
    first, second = work.run()
    paths = set(first.blocks)
    names = {rank: {file.name for file in work.state(rank).glob("*.safetensors")} for rank in range(2)}
    assert {f"{path}.block.safetensors" for path in paths} <= names[0]
    assert not any(".part." in name for name in names[0]), "matrices are on the disk once"
    assert {f"{path}.part.safetensors" for path in paths} <= names[1]
    assert not any(".block." in name for name in names[1])
    for path in paths:
        assert first.blocks[path].has_grams and first.blocks[path].has_curves
        assert not second.blocks[path].has_grams and second.blocks[path].has_curves


def test_what_a_killed_removal_leaves_is_not_taken_for_sums(work):
    """The folder of the first process went in part, and other data is measured with the same line."""
    work.run()
    for rank in range(2):
        (work.state(rank) / "progress.json").unlink()
    first, _ = work.run()
    assert_each_token_counts_once(first)


def test_a_sum_in_the_place_of_a_part_is_refused(work, kill_at):
    """As versions before this one left it."""
    kill_at(0)
    with pytest.raises(Killed):
        work.run()
    kill_at(None)
    state = LayerState(work.state(0))
    path = "model.layers.1.mlp.experts"
    part = state.read_part(path)
    state.write_part(path, type(part)(**{**vars(part), "token_count": part.token_count * 2}))
    with pytest.raises(
        HeaprError, match=f"the sum of {path} holds 70 routed tokens, and the processes counted 40; delete"
    ):
        work.run()


def test_removal_begins_with_what_says_how_far_it_came(tmp_path, monkeypatch):
    folder = StateFolder(tmp_path / "state")
    folder.path.mkdir()
    LayerState(folder.path, resumable=True).begin({"seed": 1})
    LayerState(folder.path, resumable=True).save(LayerProgress(forward=2))
    (folder.path / "a.block.safetensors").write_text("")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(type(folder.path), "unlink", raise_interrupt)
        folder.remove()
    assert (folder.path / "a.block.safetensors").exists()
    again = StateFolder(folder.path, resume=True)
    assert LayerState(again.path, resumable=True).begin({"seed": 2}) == LayerProgress(), "begun anew"
    again.remove()
    assert not folder.path.exists()


def raise_interrupt(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_no_calibration_wrote_is_not_taken_for_a_state(tmp_path, resume):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("weights")
    with pytest.raises(
        HeaprError, match="mine': is a folder that no calibration wrote, and would be deleted at the end"
    ):
        StateFolder(tmp_path / "mine", resume=resume)
    assert (tmp_path / "mine" / "model.safetensors").read_text() == "weights"


def test_what_was_put_beside_a_state_stays(tmp_path, heapr_log):
    folder = StateFolder(tmp_path / "state")
    folder.remove()  # there is none yet
    folder.path.mkdir()
    LayerState(folder.path, resumable=True).begin({})
    for name in ("a.block.safetensors", "notes.txt"):
        (folder.path / name).write_text("")
    folder.remove()
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]
    assert "holds files that no calibration wrote" in heapr_log.text


def test_what_the_first_process_cannot_hold_is_refused_before_it_begins(work, monkeypatch):
    """It has the matrices of as many layers at once as there are processes."""
    experts = tiny_model().config.num_experts, tiny_model().config.moe_intermediate_size
    of_one_layer = 2 * 4 * experts[0] * experts[1] ** 2  # matrices, bytes
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * of_one_layer - 1)
    monkeypatch.setattr(LayerWalk, "capture", lambda *_, **__: pytest.fail("measuring began"))
    with pytest.raises(HeaprError, match=f"statistics='gram': needs {2 * of_one_layer:,} bytes on cpu"):
        work.run()
