# Licensed under the Apache License, Version 2.0
"""What a second process saves of the stages after calibration: removal curves, fits over blocks, training of blocks.

    python benchmarks/processes.py --model MODEL --text calibration.jsonl

One process, two of one thread each, and two runs of one process each at the same time, in turns; each run starts its processes,
which load, wait for one another and then do one stage. Two runs do twice the work and have nothing to say to one another: what they
take is what the machine's caches and memory leave to two processes, and so the most that two can save. Times are by the clock on the
wall, so nothing else should run, and those of the processor, of the busier process; the best of the rounds of each. What one and two
make is compared: the largest difference of an error of a block on held-out tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from optimum_heapr import AtomicStatistics, HeaprConfig, HeaprPruner, PruningPlan
from optimum_heapr.calibration import runner
from optimum_heapr.cli.tables import table


STAGES = ("removal curves", "fits", "fits and training")


def config_of(args: argparse.Namespace, stage: str) -> HeaprConfig:
    samples = {"dataset": args.text, "num_samples": args.samples, "seq_length": args.length, "batch_size": 8}
    if stage == "removal curves":
        return HeaprConfig(criterion="obs", **{**samples, "num_samples": 16})
    steps = args.steps if stage == "fits and training" else 0
    return HeaprConfig(
        ratio=0.5, compensate=True, compensation_scope="block", reconstruction_steps=steps, eval_samples=0, **samples
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args, *args.worker)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pruner = HeaprPruner.from_pretrained(args.model, config_of(args, "fits"), dtype="float32")
        pruner.calibrate()
        pruner.statistics.save(Path(folder) / "statistics")
        for stage in args.stages:
            ways = {"one": (1, 1), "two": (2, 1), "two runs": (1, 2)}
            found = {way: [] for way in ways}
            for _ in range(args.rounds):
                for way, (processes, runs) in ways.items():
                    found[way].append(run_processes(stage, processes, runs, Path(folder)))
            best = {
                clock: {way: min(run[clock] for run in runs) for way, runs in found.items()}
                for clock in ("wall", "processor")
            }
            one, two = (found[way][0]["errors"] for way in ("one", "two"))
            apart = max((abs(a - b) / a for a, b in zip(one, two, strict=True)), default=0.0)
            ratios = [times["one"] / times["two"] for times in best.values()]
            possible = [2 * times["one"] / times["two runs"] for times in best.values()]
            seconds = (f"{best['wall'][way]:.1f}" for way in ("one", "two"))
            rows.append([stage, *seconds, *(f"{ratio:.2f}" for ratio in (*ratios, *possible)), f"{apart:.0e}"])
            print(rows[-1], flush=True)
    header = ["stage", "one process, s", "two, s", "ratio", "processor", "two runs at once", "processor", "difference"]
    print(table(header, rows))


def run_processes(stage: str, processes: int, runs: int, folder: Path) -> dict:
    """The longest times of some runs at once, in seconds, and the errors that the first process found."""
    running = [process for _ in range(runs) for process in started(stage, processes, folder)]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    return {**found[0], **{clock: max(part[clock] for part in found) for clock in ("wall", "processor")}}


def started(stage: str, processes: int, folder: Path) -> list[subprocess.Popen]:
    """The processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--worker", stage, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def work(args: argparse.Namespace, stage: str, folder: str) -> None:
    """One of the processes: does the stage, and prints the seconds that it took."""
    from accelerate import PartialState

    from optimum_heapr.calibration.processes import start_processes
    from optimum_heapr.surgery.apply import apply_plan
    from optimum_heapr.text.samples import load_calibration_data

    start_processes()
    config, state, errors = config_of(args, stage), PartialState(), []
    pruner = HeaprPruner.from_pretrained(args.model, config, dtype="float32")
    clocks = {"wall": time.perf_counter, "processor": time.process_time}

    def timed(function):
        def run(*arguments, **named):
            state.wait_for_everyone()
            before = {name: clock() for name, clock in clocks.items()}
            result = function(*arguments, **named)
            run.took = {name: clock() - before[name] for name, clock in clocks.items()}
            return result

        return run

    if stage == "removal curves":
        runner.finished_blocks = timed = timed(runner.finished_blocks)
        pruner.calibrate()
    else:
        plan = PruningPlan.build(AtomicStatistics.load(Path(folder) / "statistics"), config)
        data, timed = load_calibration_data(config, pruner.tokenizer), timed(apply_plan)
        timed(pruner.model, plan, None, data)
        errors = [done["trained"] for done in plan.reconstruction.values()]
        errors = errors or [pairs[0][1] for pairs in plan.compensation.values()]
    print(json.dumps({**timed.took, "errors": errors}))
    if state.num_processes > 1:
        state.destroy_process_group()


if __name__ == "__main__":
    main()
