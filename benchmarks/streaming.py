# Licensed under the Apache License, Version 2.0
"""Calibration layer by layer against the plain run: peak memory, time, and whether the statistics are the same.

A random Qwen3-MoE of `--gigabytes` is written to a temporary folder. Each row of the table is a process of its own, from
loading to statistics, so that its peak memory is its own; what a process takes that has imported everything and loaded
nothing is the first row. Times are of the processor and by the clock on the wall, loading included; one thread, or as many as
`OMP_NUM_THREADS` says. Prints one Markdown table.

With `--fits` the table is about what comes after: the peak of compensation over blocks and of reconstruction from the checkpoint, beside
what is stated before they begin.

With `--cold` the table is another one: seconds on the wall where no weights are in the page cache when a run begins, nor when its
second pass does, with and without reading the next layer ahead. Only on an idle machine does it say anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch


ROWS = (
    # name, memory, criterion
    ("plain", "plain", "heapr"),
    ("streaming", "streaming", "heapr"),
    ("plain, second order", "plain", "obs"),
    ("streaming, second order", "streaming", "obs"),
)


def make_checkpoint(folder: Path, args: argparse.Namespace) -> int:
    """Writes the model and returns the bytes of its weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    dtype = getattr(torch, args.dtype)
    one = args.experts * 3 * args.hidden * args.width + 2 * args.hidden * args.hidden * 3 // 2
    layers = args.layers or max(24, round(args.gigabytes * 1e9 / dtype.itemsize / one))
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=args.hidden,
        moe_intermediate_size=args.width,
        num_hidden_layers=layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
        head_dim=64,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="500MB")
    return sum(parameter.numel() * parameter.dtype.itemsize for parameter in model.parameters())


def measure(folder: str, memory: str, criterion: str, output: str, samples: int, length: int, budget: str) -> None:
    """One row: loads, calibrates, writes the statistics, prints what it took."""
    from datasets import Dataset

    from optimum_heapr import HeaprConfig, HeaprPruner
    from optimum_heapr.calibration.cost import peak_resident_bytes

    ids = torch.randint(0, 8192, (samples, length), generator=torch.Generator().manual_seed(1)).tolist()
    config = HeaprConfig(criterion=criterion, num_samples=samples, seq_length=length)
    began = time.process_time(), time.perf_counter()
    spent, cost = (0.0, 0.0), None
    if memory != "none":
        pruner = HeaprPruner.from_pretrained(folder, config, memory=memory, activation_memory=budget)
        measured = pruner.calibrate(Dataset.from_dict({"input_ids": ids}), keep_grams=False)
        spent = time.process_time() - began[0], time.perf_counter() - began[1]
        peak, cost = measured.cost.peak_bytes, str(measured.cost)
        measured.save(output)
    else:
        import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

        import optimum_heapr.calibration.streaming  # noqa: F401

        peak = peak_resident_bytes()
    print(json.dumps({"peak": peak, "cpu": spent[0], "wall": spent[1], "cost": cost}))


def measure_fits(folder: str, steps: str, statistics: str, samples: int, length: int, budget: str) -> None:
    """Peak memory of making what the blocks become, from the checkpoint; and the bytes that are stated for that."""
    from optimum_heapr import AtomicStatistics, HeaprConfig, HeaprPruner
    from optimum_heapr.experts import find_expert_blocks
    from optimum_heapr.surgery.block_compensation import needed_bytes
    from optimum_heapr.text.samples import CalibrationData
    from optimum_heapr.utils.sizes import parse_size

    options = {"compensate": True, "compensation_scope": "block", "reconstruction_steps": int(steps)}
    config = HeaprConfig(ratio=0.5, num_samples=samples, seq_length=length, **options)
    ids = torch.randint(0, 8192, (samples, length), generator=torch.Generator().manual_seed(1))
    pruner = HeaprPruner.from_pretrained(folder, config, memory="streaming", activation_memory=budget)
    pruner.statistics = AtomicStatistics.load(statistics)
    pruner.calibration_data = CalibrationData(list(ids), "random", 0, length)
    plan, model = pruner.plan(), pruner.model
    warm = config.replace(dataset="demo", num_samples=4, seq_length=64)
    HeaprPruner.from_pretrained(
        "demo", warm, memory="streaming"
    ).prune()  # what libraries take once is no matter of the model
    before = most = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    pruner.apply(plan)
    done.set()
    watcher.join()
    layer = sum(part.numel() * part.element_size() for part in model.model.layers[0].parameters())
    block = needed_bytes(model, find_expert_blocks(model), config)
    stated = {"layer": layer, "inputs": parse_size("activation_memory", budget), "block": block}
    print(json.dumps({"taken": most - before, **stated}))


def anonymous_bytes() -> int:
    """What this process has in memory that no file backs: tensors, but not libraries, of which the system takes pages back."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def fits_table(place: Path, common: list[str]) -> None:
    """The peaks, each of a process of its own, beyond what that had before."""
    files = str(place / "statistics.safetensors")
    run_row([str(place / "model"), "streaming", "heapr", files, "2", *common[1:]])  # whatever it is that stays
    print("| run | a layer | its inputs | a block | stated | measured | ratio |\n|---|---|---|---|---|---|---|")
    for name, steps in (("compensation over blocks", "0"), ("and reconstruction", "4")):
        found = run_row([str(place / "model"), steps, files, *common], "--fits-worker")
        stated = [found[part] for part in ("layer", "inputs", "block")]
        cells = " | ".join(f"{part / 1e6:.0f}" for part in (*stated, sum(stated), found["taken"]))
        print(f"| {name} | {cells} | {found['taken'] / sum(stated):.2f} |", flush=True)


def forget(folder: str) -> None:
    """Has the system drop the weights from its page cache."""
    for path in Path(folder).glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_cold(folder: str, ahead: str, samples: int, length: int, budget: str) -> None:
    """Seconds on the wall of a calibration layer by layer whose weights come from the disk in both passes."""
    from datasets import Dataset

    from optimum_heapr import HeaprConfig, HeaprPruner
    from optimum_heapr.calibration.streaming import _Schedule
    from optimum_heapr.layerwise.source import SourceCheckpoint

    head = _Schedule._head

    def between_passes(schedule):
        head(schedule)
        forget(folder)

    _Schedule._head = between_passes
    if ahead == "no":
        SourceCheckpoint.read_ahead = lambda self, names: None
    ids = torch.randint(0, 8192, (samples, length), generator=torch.Generator().manual_seed(1)).tolist()
    config = HeaprConfig(num_samples=samples, seq_length=length)
    pruner = HeaprPruner.from_pretrained(folder, config, memory="streaming", activation_memory=budget)
    forget(folder)
    began = time.perf_counter()
    pruner.calibrate(Dataset.from_dict({"input_ids": ids}))
    print(json.dumps({"wall": time.perf_counter() - began}))


def cold_table(folder: Path, size: int, common: list[str]) -> None:
    """Three rounds in turns; the medians."""
    found: dict[str, list[float]] = {"warm": [], "no": [], "yes": []}
    for _ in range(3):
        for way, times in found.items():
            worker = "--worker" if way == "warm" else "--cold-worker"
            rest = ["streaming", "heapr", str(folder.parent / "warm.safetensors")] if way == "warm" else [way]
            times.append(run_row([str(folder), *rest, *common], worker)["wall"])
    seconds = {way: statistics.median(times) for way, times in found.items()}
    forget(str(folder))
    began = time.perf_counter()
    for path in folder.glob("*.safetensors"):
        path.read_bytes()
    print(f"{size / 1e9:.2f} GB of weights; reading them once takes {time.perf_counter() - began:.1f} s\n")
    print("| weights | seconds | ratio |\n|---|---|---|")
    names = {"warm": "in the page cache", "no": "on the disk", "yes": "on the disk, the next layer read ahead"}
    for way, name in names.items():
        print(f"| {name} | {seconds[way]:.1f} | {seconds[way] / seconds['warm']:.2f} |")


def run_row(arguments: list[str], worker: str = "--worker") -> dict:
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    if worker == "--fits-worker":
        # What is freed goes back to the system at once, in place of waiting in the process for the next of its size.
        env["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    output = subprocess.run([sys.executable, __file__, worker, *arguments], capture_output=True, text=True, env=env)
    if output.returncode:
        raise SystemExit(output.stderr)
    return json.loads(output.stdout.splitlines()[-1])


def agreement(one: Path, other: Path) -> str:
    """Largest relative difference of the statistics, and whether half the atomic experts kept are the same ones."""
    from optimum_heapr import AtomicStatistics, HeaprConfig, PruningPlan

    first, second = AtomicStatistics.load(one), AtomicStatistics.load(other)
    names = ("activation_sq_sum", "gradient_sq_sum", "fisher_sum")
    worst = max(
        float(((getattr(block, name) - getattr(second.blocks[path], name)).abs() / getattr(block, name)).max())
        for path, block in first.blocks.items()
        for name in names
    )
    criterion = "obs" if next(iter(first.blocks.values())).has_curves else "heapr"
    config = HeaprConfig(ratio=0.5, criterion=criterion)
    kept, others = PruningPlan.build(first, config).kept, PruningPlan.build(second, config).kept
    atoms = sum(len(indices) for experts in kept.values() for indices in experts)
    shared = sum(
        len(set(a.tolist()) & set(b.tolist())) for path in kept for a, b in zip(kept[path], others[path], strict=True)
    )
    return f"{worst:.1e} | {shared / atoms:.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--experts", type=int, default=16, help="of a layer")
    parser.add_argument("--top-k", type=int, default=4, help="experts of a token")
    parser.add_argument("--layers", type=int, help="in place of --gigabytes")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--activation-memory", default="64MB")
    parser.add_argument("--fits", action="store_true", help="peaks of compensation over blocks and of reconstruction")
    parser.add_argument("--cold", action="store_true", help="seconds on the wall with nothing in the page cache")
    parser.add_argument("--folder", default=None, help="where the model is written; needs its size free")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        place = Path(folder)
        size = make_checkpoint(place / "model", args)
        common = [str(args.samples), str(args.length), args.activation_memory]
        if args.cold:
            return cold_table(place / "model", size, common)
        base = run_row([str(place / "model"), "none", "heapr", "-", *common])["peak"]
        print(
            f"{size / 1e9:.2f} GB of weights, {args.samples} x {args.length} tokens, budget {args.activation_memory}\n"
        )
        if args.fits:
            return fits_table(place, common)
        columns = "run | peak, MB | without libraries, share of the weights | processor s | ratio | wall s | ratio"
        print(f"| {columns} | difference | same kept |\n|{'---|' * 9}")
        print(f"| nothing loaded | {base / 1e6:.0f} | | | | | | | |")
        results, files = {}, {}
        for name, memory, criterion in ROWS:
            files[memory, criterion] = place / f"{memory}-{criterion}.safetensors"
            found = run_row([str(place / "model"), memory, criterion, str(files[memory, criterion]), *common])
            results[memory, criterion] = found
            plain = results["plain", criterion]
            times = (f"{found[clock]:.0f} | {found[clock] / plain[clock]:.2f}" for clock in ("cpu", "wall"))
            same = agreement(files["plain", criterion], files[memory, criterion]) if memory == "streaming" else "|"
            share = (found["peak"] - base) / size
            print(f"| {name} | {found['peak'] / 1e6:.0f} | {share:.2f} | {' | '.join(times)} | {same} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        folder, memory, criterion, output, samples, length, budget = sys.argv[2:]
        measure(folder, memory, criterion, output, int(samples), int(length), budget)
    elif sys.argv[1:2] == ["--fits-worker"]:
        folder, steps, output, samples, length, budget = sys.argv[2:]
        measure_fits(folder, steps, output, int(samples), int(length), budget)
    elif sys.argv[1:2] == ["--cold-worker"]:
        folder, ahead, samples, length, budget = sys.argv[2:]
        measure_cold(folder, ahead, int(samples), int(length), budget)
    else:
        main()
