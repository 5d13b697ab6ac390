# Licensed under the Apache License, Version 2.0
"""What a calibration layer by layer leaves on the disk, where files cannot be deleted while they are mapped."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from optimum_heapr import AtomicStatistics, HeaprConfig, HeaprPruner
from tests.helpers import random_ids, tiny_model, tiny_tokenizer


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


@pytest.fixture
def network_file_system(monkeypatch):
    """As NFS: a file that is mapped is not deleted but renamed, and the folder that it is in cannot be deleted."""
    unlink = os.unlink

    def renamed(path, *, dir_fd=None):
        folder = Path(path).parent if dir_fd is None else Path(os.readlink(f"/proc/self/fd/{dir_fd}"))
        file = folder / os.path.basename(path)
        if str(file) in Path("/proc/self/maps").read_text():
            os.rename(file, folder / f".nfs{file.name}")
        else:
            unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", renamed)
    monkeypatch.setattr(os, "remove", renamed)

    def path_unlink(path, missing_ok=False):
        if not missing_ok or path.exists():
            renamed(path)

    monkeypatch.setattr(Path, "unlink", path_unlink)  # has a reference of its own to that of the system in Python 3.10


@pytest.fixture
def pruner(tmp_path):
    def made(**options):
        config = HeaprConfig(num_samples=4, seq_length=16, **options)
        return HeaprPruner.from_pretrained(
            tmp_path / "model", config, memory="streaming", offload_folder=tmp_path / "offload"
        )

    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    return made


ROWS = Dataset.from_dict({"input_ids": random_ids(4, 16).tolist()})


def test_vectors_hang_on_no_file(pruner, tmp_path, network_file_system):
    statistics = pruner().calibrate(ROWS)
    assert not list((tmp_path / "offload").iterdir())
    assert str(tmp_path / "offload") not in Path("/proc/self/maps").read_text()
    assert all(int(block.token_count.sum()) == 4 * 16 * 2 for block in statistics.blocks.values())


def test_matrices_have_their_files_as_long_as_the_statistics(pruner, tmp_path, network_file_system):
    statistics = pruner(statistics="gram").calibrate(ROWS)
    (work,) = (tmp_path / "offload").iterdir()
    assert work.is_dir() and not list(work.glob(".nfs*"))
    statistics.save(tmp_path / "saved")
    del statistics
    gc.collect()
    assert not list((tmp_path / "offload").iterdir())
    saved = AtomicStatistics.load(tmp_path / "saved")
    for (
        block
    ) in saved.blocks.values():  # the trace of the matrix is the sum of squares that was measured apart from it
        trace = block.gradient_gram_sum.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(trace, block.gradient_sq_sum, rtol=1e-5, atol=0)


def test_a_state_that_could_not_go_is_no_interrupted_run(pruner, tmp_path, network_file_system):
    first = pruner(statistics="gram")
    first.calibrate(ROWS, state_path=tmp_path / "state")
    assert all(name.startswith(".nfs") for name in os.listdir(tmp_path / "state"))
    second = pruner(statistics="gram").calibrate(ROWS, state_path=tmp_path / "state")
    for path, block in first.statistics.blocks.items():  # still whole, whatever lies where they were
        assert torch.equal(block.activation_gram_sum, second.blocks[path].activation_gram_sum)


@pytest.mark.parametrize("flags", [["calibrate"], ["prune", "--dry-run"], ["prune"]])
def test_commands_leave_their_output_alone(flags, pruner, tmp_path, network_file_system, monkeypatch):
    from optimum.commands.optimum_cli import main

    (tmp_path / "text.jsonl").write_text(
        '{"text": "Whoever measures twice cuts once, and whoever cuts twice."}\n' * 20
    )
    output = tmp_path / "out" / "put"
    output.parent.mkdir()
    measured = ["--dataset", tmp_path / "text.jsonl", "--num-samples", 4, "--seq-length", 16, "--memory", "streaming"]
    chosen = ["--statistics", "gram"] if flags == ["calibrate"] else ["--criterion", "obs", "--compensate"]
    command = [*flags, "-m", tmp_path / "model", "-o", output, *measured, *chosen]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "heapr", *map(str, command)])
    main()
    assert os.listdir(output.parent) == ([] if "--dry-run" in flags else ["put"])
