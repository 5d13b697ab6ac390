# Licensed under the Apache License, Version 2.0
"""Two processes, each with its share of the samples, measure what one process does."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor

from optimum_heapr import HeaprError, HeaprPruner
from optimum_heapr.calibration import processes, runner
from optimum_heapr.calibration.processes import (
    added,
    check_launcher,
    check_placement,
    check_same_run,
    finished_blocks,
    start_processes,
)
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.calibration.statistics import AtomicStatistics
from optimum_heapr.calibration.streaming import calibrate_streaming
from optimum_heapr.checkpoints.loading import load_model, source_of
from optimum_heapr.criteria.obs import with_removal_curve
from optimum_heapr.layerwise.walk import LayerWalk
from tests.helpers import assert_same_statistics, calibration_data, tiny_model
from tests.processes import in_two_processes
from tests.ranks import Ranks


LENGTHS = (16, 7, 12, 16, 3)

SCRIPT = f"""
import os, sys, torch
from optimum_heapr import HeaprError
from optimum_heapr.calibration.processes import check_placement
from optimum_heapr.calibration.runner import calibrate
from tests.helpers import calibration_data, tiny_model
statistics = calibrate(tiny_model(dtype=torch.float64), calibration_data(*{LENGTHS}), batch_size=2, gram=True)
statistics.save(os.path.join(sys.argv[1], os.environ["RANK"]))
from pathlib import Path
from optimum_heapr.calibration.streaming import calibrate_streaming
from optimum_heapr.checkpoints.loading import load_model, source_of
model, _ = load_model(sys.argv[1] + "/model", skeleton=True)
source = source_of(model)
work = Path(sys.argv[1], "work" + os.environ["RANK"])
work.mkdir()
statistics = calibrate_streaming(model, source, calibration_data(*{LENGTHS}), work, batch_size=2, gram=True)
statistics.save(os.path.join(sys.argv[1], "streamed" + os.environ["RANK"]))
from optimum_heapr.calibration.processes import added, start_processes
tensor = torch.ones(3)
assert added(start_processes(), tensor) is tensor and tensor.tolist() == [2, 2, 2]  # on what accelerate calls the CPU
tensor = torch.arange(12.0).view(3, 4)
assert torch.equal(added(start_processes(), tensor[:, 1:3]), 2 * tensor[:, 1:3])
assert torch.equal(tensor, torch.arange(12.0).view(3, 4))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    """Three micro-batches for two processes: one gets two of them, and samples of different length. Streaming as well."""
    tiny_model(dtype=torch.float64).save_pretrained(tmp_path / "model")
    processes = in_two_processes(SCRIPT, tmp_path)
    assert [process.returncode for process in processes] == [0, 0], [process.stderr for process in processes]

    expected = calibrate(tiny_model(dtype=torch.float64), calibration_data(*LENGTHS), batch_size=2, gram=True)
    for name in ("0", "1", "streamed0", "streamed1"):
        actual = AtomicStatistics.load(tmp_path / name)
        assert_same_statistics(actual, expected)
        assert actual.fingerprint["loss"] == pytest.approx(expected.fingerprint["loss"], rel=1e-12)
        for path, block in expected.blocks.items():
            # Matrices stay with the first process: the others would hold the same hundreds of gigabytes.
            grams = () if name.endswith("1") else ("activation_gram_sum", "gradient_gram_sum")
            assert actual.blocks[path].has_grams == bool(grams)
            for part in ("output_norm_sum", *grams):
                torch.testing.assert_close(getattr(actual.blocks[path], part), getattr(block, part))
            assert torch.equal(actual.blocks[path].weight_norm, block.weight_norm)


def test_each_process_finishes_its_share_of_the_blocks(monkeypatch):
    """Each block once, of the sums over all processes, and all processes have what came of it; three blocks, two processes."""
    blocks = calibrate(tiny_model(), calibration_data(8, 8), gram=True).blocks
    ranks, done = Ranks(monkeypatch), []
    blocks = {f"{path}.{turn}": block for turn in (0, 1) for path, block in blocks.items()}
    del blocks[next(reversed(blocks))]

    def measure(rank):
        def finish(path, block):
            assert block.has_grams
            done.append((path, rank))
            return with_removal_curve(path, block)

        own = [(path, copy.deepcopy(block)) for path, block in blocks.items()]  # whose place sums may take
        return finished_blocks(ranks, own, finish)

    first, second = ranks.run(measure)
    assert sorted(done) == sorted((path, turn % 2) for turn, path in enumerate(blocks))
    for path, block in blocks.items():
        doubled = replace(block, **{name: 2 * part for name, part in block.sums.items()})
        expected = with_removal_curve(path, doubled)
        for found in (first[path], second[path]):
            for name in ("removal_order", "removal_cost", "removal_ridge", "removal_scale", "fisher_sum"):
                assert torch.equal(getattr(found, name), getattr(expected, name))
        assert torch.equal(first[path].gradient_gram_sum, expected.gradient_gram_sum)
        assert not second[path].has_grams


def test_sums_take_the_place_of_what_a_process_had(monkeypatch):
    """Of matrices of gigabytes there is no second copy."""
    ranks = Ranks(monkeypatch)

    def add(rank):
        tensor = torch.arange(3.0) * (rank + 1)
        return tensor, added(ranks, tensor)

    for tensor, total in ranks.run(add):
        assert total is tensor and total.tolist() == [0, 3, 6]


def test_a_process_that_fails_to_finish_ends_all(monkeypatch):
    blocks = list(calibrate(tiny_model(), calibration_data(8), gram=True).blocks.items())
    ranks = Ranks(monkeypatch)

    def finish(path, block):
        raise HeaprError(f"{path}: cannot be finished")

    with pytest.raises(HeaprError, match="cannot be finished"):
        ranks.run(lambda rank: finished_blocks(ranks, blocks, finish if rank else with_removal_curve))


def changed_model():
    """Another attention, as after merging LoRA: the experts and all shapes are the same."""
    model = tiny_model()
    model.model.layers[1].self_attn.o_proj.weight.data += 1
    return model


DIFFERENT = {
    "text": (r'data.sha256 is "\w+" on rank 0 and "\w+" on rank 1', {"data": calibration_data(8, 8, seed=5)}),
    "tokens": ("data.num_tokens is 16 on rank 0 and 12 on rank 1", {"data": calibration_data(8, 4)}),
    "weights": (r'weights is "2:\w+" on rank 0 and "2:\w+" on rank 1', {"model": changed_model}),
    "options": ("batch_size is 1 on rank 0 and 2 on rank 1", {"batch_size": 2}),
}


@pytest.mark.parametrize("memory", ["plain", "streaming"])
@pytest.mark.parametrize("what", DIFFERENT)
def test_processes_that_would_measure_other_things_are_refused(what, memory, tmp_path, monkeypatch):
    """Before the first micro-batch, by one line that names both values and the rank."""
    message, changes = DIFFERENT[what]
    ranks, models = Ranks(monkeypatch), [tiny_model(), changes.get("model", tiny_model)()]
    if memory == "streaming":
        for rank, model in enumerate(models):
            model.save_pretrained(tmp_path / str(rank))
            models[rank], _ = load_model(tmp_path / str(rank), skeleton=True)
    for name in ("all_reduce", "reduce"):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda *_, **__: pytest.fail("sums were added"))
    monkeypatch.setattr(runner, "_Measuring", lambda *_: pytest.fail("measuring began"))
    monkeypatch.setattr(LayerWalk, "capture", lambda *_, **__: pytest.fail("measuring began"))

    def measure(rank):
        given = {"data": calibration_data(8, 8), "batch_size": 1} | (changes if rank else {}) | {"model": models[rank]}
        if memory == "plain":
            return calibrate(**given)
        work = tmp_path / f"work{rank}"
        work.mkdir()
        return calibrate_streaming(source=source_of(models[rank]), folder=work, **given)

    with pytest.raises(
        HeaprError, match=f"processes: their sums cannot be added, .*{message}.*; start all of them with"
    ) as error:
        ranks.run(measure)
    assert "\n" not in str(error.value)


def test_one_text_under_two_names_is_one(monkeypatch):
    """On another host it may lie elsewhere; and where memory is short, weights are offloaded and have no hash."""
    ranks = Ranks(monkeypatch)
    data = [calibration_data(8, 8), calibration_data(8, 8)]
    data[1].source = "/elsewhere/text.jsonl"

    def compare(rank):
        model = {"weights": [None, "2:0123"][rank], "shapes": "4567"}
        check_same_run(ranks, {"model": model, "data": data[rank].fingerprint})

    ranks.run(compare)


def test_processes_in_different_modes_are_refused(tmp_path, monkeypatch):
    """`--memory auto` decides by the memory of each host."""
    ranks, model = Ranks(monkeypatch), tiny_model()
    model.save_pretrained(tmp_path / "model")
    skeleton, _ = load_model(tmp_path / "model", skeleton=True)

    def measure(rank):
        if rank == 0:
            return calibrate(model, calibration_data(8, 8))
        return calibrate_streaming(skeleton, source_of(skeleton), calibration_data(8, 8), tmp_path)

    with pytest.raises(HeaprError, match='memory is "all weights at once" on rank 0 and "streaming" on rank 1'):
        ranks.run(measure)


def test_a_model_spread_over_devices_is_for_one_process():
    model = tiny_model()
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}
    check_placement(model, 1)
    with pytest.raises(
        HeaprError, match="device_map: spreads the model over 0, 1, cpu, and each of 2 processes would"
    ):
        check_placement(model, 2)
    model.hf_device_map = {"": 1}
    check_placement(model, 2)


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
    ],
)
def test_a_launcher_that_shards_is_refused(variable, name, monkeypatch):
    check_launcher()
    monkeypatch.setenv(variable, "false")
    check_launcher()
    monkeypatch.setenv(variable, "true")
    with pytest.raises(
        HeaprError,
        match=rf"launcher: accelerate uses {name} \({variable}\); each process of a calibration holds the whole model.*"
        "use tp_plan='auto', or one process with memory='auto' or device_map='auto'",
    ):
        check_launcher()
    with pytest.raises(HeaprError, match=f"launcher: accelerate uses {name}"):
        calibrate(tiny_model(), calibration_data(8))


@pytest.fixture
def one_process_group():
    """A process group of this process alone, on which models can be sharded."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_wrapped_model_is_refused(one_process_group):
    sharded = torch.distributed.fsdp.FullyShardedDataParallel(tiny_model(), device_id=torch.device("cpu"))
    with pytest.raises(
        HeaprError, match="model: is sharded by FSDP1, which hides its weights; use fully_shard of FSDP2"
    ):
        calibrate(sharded, calibration_data(8))

    copied = torch.nn.parallel.DistributedDataParallel(tiny_model())
    for refuses in (HeaprPruner, lambda model: calibrate(model, calibration_data(8))):
        with pytest.raises(HeaprError, match="DistributedDataParallel; pass what is inside, model.module"):
            refuses(copied)


def test_a_model_with_whole_experts_and_parts_of_others_is_refused(one_process_group):
    """Each process would measure all of what it has the experts for."""
    parallel = tiny_model()
    attention = parallel.model.layers[0].self_attn
    attention.q_proj.weight = torch.nn.Parameter(
        torch.distributed.tensor.distribute_tensor(attention.q_proj.weight.detach(), one_process_group)
    )
    with pytest.raises(
        HeaprError, match="does not split the experts by width alone .*: gate_up_proj whole, down_proj whole"
    ):
        calibrate(parallel, calibration_data(8))


def test_one_process_where_several_were_asked_for_is_said(monkeypatch, heapr_log):
    processes._say_that_one_was_started.cache_clear()  # once a process, and this one runs other tests
    for variable in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(variable, raising=False)
    start_processes()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # accelerate launch --num_processes 1
    start_processes()
    assert not heapr_log.records
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # accelerate launch --cpu --num_processes 2
    start_processes()
    assert "asked for several processes but started one" in heapr_log.text
