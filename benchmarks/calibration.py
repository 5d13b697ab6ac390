# Licensed under the Apache License, Version 2.0
"""What calibration costs: against a bare forward and backward, the paper's procedure, more processes, half precision.

    python benchmarks/calibration.py --model MODEL --text calibration.jsonl

One table of ratios, all from one run. Times are those of the processor on one thread, the median over rounds in which the
sides take turns, so that they do not depend on what else runs; only the two processes are timed by the clock on the wall as
well. `--model` and `--text` are for the rankings in half precision, which need a model that was trained.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from explicit_covariances import explicit_scores
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from optimum_heapr import AtomicStatistics, HeaprConfig, HeaprPruner
from optimum_heapr.calibration.loss import summed_token_loss
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.cli.tables import table
from optimum_heapr.criteria import importance
from optimum_heapr.text.samples import CalibrationData


VOCABULARY = 151_936  # that of Qwen3
PARTS = ("cost", "processes", "loss", "ranking")


def random_model(args: argparse.Namespace, dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        head_dim=64,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        moe_intermediate_size=args.width,
    )
    model = Qwen3MoeForCausalLM(config).to(dtype).eval().requires_grad_(False)
    model.set_experts_implementation("grouped_mm")
    return model


def random_data(samples: int, length: int, vocabulary: int = 4096) -> CalibrationData:
    ids = torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
    return CalibrationData(list(ids), "random tokens", 0, length)


def floor(model: torch.nn.Module, samples: list[torch.Tensor]) -> None:
    """One forward and one backward down to the embeddings, no weight gradients, with the loss of calibration."""
    for ids in samples:
        ids = ids[None]
        embeddings = model.get_input_embeddings()(ids).requires_grad_(True)
        mask = torch.ones_like(ids)
        logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
        summed_token_loss(logits, ids, mask)[0].backward()


def processor_seconds(rounds: int, **sides: Callable[[], object]) -> tuple[dict[str, list[float]], dict[str, object]]:
    """Seconds of each side in each round, taken in turns after one round that does not count, and what each returned."""
    seconds, results = {name: [] for name in sides}, {}
    for number in range(rounds + 1):
        for name, work in sides.items():
            start = time.process_time()
            results[name] = work()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds, results


def ratio_of(seconds: dict[str, list[float]], side: str, other: str) -> str:
    return f"{statistics.median(a / b for a, b in zip(seconds[side], seconds[other])):.2f}"


def cost_rows(args: argparse.Namespace) -> list[list[str]]:
    rows = []
    for name in ("float32", "bfloat16"):
        model, data = random_model(args, getattr(torch, name)), random_data(args.samples, args.length)

        def calibrate_from_embeddings(model=model, data=data):
            """The graph of calibration begins at the first block of experts; here it begins where the floor's does."""
            model.enable_input_require_grads()
            try:
                return calibrate(model, data)
            finally:
                model.disable_input_require_grads()

        seconds, results = processor_seconds(
            args.rounds,
            floor=lambda: floor(model, data.samples),
            calibration=lambda: calibrate(model, data),
            whole=calibrate_from_embeddings,
            gram=lambda: calibrate(model, data, gram=True),
            explicit=lambda: explicit_scores(model, data.samples),
        )
        rows += [
            [f"processor time, {name}", "calibration", "bare forward and backward"]
            + [ratio_of(seconds, "calibration", "floor"), "<= 1.15"],
            [f"processor time, {name}", "calibration, gradients down to the embeddings", "bare forward and backward"]
            + [ratio_of(seconds, "whole", "floor"), "<= 1.15"],
            [f"processor time, {name}", "calibration with second-order statistics", "bare forward and backward"]
            + [ratio_of(seconds, "gram", "floor"), ""],
            [f"processor time, {name}", "explicit covariances", "calibration"]
            + [ratio_of(seconds, "explicit", "calibration"), ">= 2.2"],
        ]
        measured, (explicit, explicit_bytes) = results["calibration"], results["explicit"]
        ours = sum(t.numel() * t.element_size() for block in measured.blocks.values() for t in block.sums.values())
        if name == "float32":
            difference = largest_difference(importance(measured, "heapr"), explicit, measured)
            assert difference < 1e-3, f"scores differ by {difference}"
            rows.append(["largest difference of a score, float32", "explicit covariances", "calibration"])
            rows[-1] += [f"{difference:.0e}", "< 1e-3"]
            rows.append(["memory of the statistics", "explicit covariances", "calibration"])
            rows[-1] += [f"{explicit_bytes / ours:.0f}", ">= 300"]
    return rows


def largest_difference(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], measured: AtomicStatistics
) -> float:
    """Largest difference of a score, relative to the mean of its expert, among experts that tokens reached.

    Not relative to the score: with a single token it is the square of one sum, which may all but cancel.
    """
    return max(
        ((ours[path] - theirs[path]).abs() / theirs[path].mean(1, keepdim=True))[block.reached].max().item()
        for path, block in measured.blocks.items()
    )


def process_rows(args: argparse.Namespace) -> list[list[str]]:
    """One process and two, each with one thread, in turns; the time from when all are ready to when all are done."""
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for processes in found:
                found[processes].append(run_processes(args, processes, Path(folder)))
        one, two = (AtomicStatistics.load(Path(folder) / str(processes)) for processes in found)
    for path, block in one.blocks.items():
        torch.testing.assert_close(two.blocks[path].gradient_sq_sum, block.gradient_sq_sum, rtol=1e-5, atol=0)
    rows = []
    for clock in ("wall", "processor"):
        best = {processes: min(run[clock] for run in runs) for processes, runs in found.items()}
        rows.append([f"{clock} time, float32", "one process", "two processes", f"{best[1] / best[2]:.2f}", ">= 1.6"])
    return rows


def run_processes(args: argparse.Namespace, processes: int, folder: Path) -> dict[str, float]:
    """The longest times of one run, in seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    output = folder / str(processes)
    running = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--worker", output],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    times = [json.loads(process.communicate()[0]) for process in running]
    return {clock: max(part[clock] for part in times) for clock in times[0]}


def work(args: argparse.Namespace) -> None:
    """One of the processes: measures its share, and prints the seconds that it took."""
    from accelerate import PartialState

    model, data = random_model(args, torch.float32), random_data(8, args.length // 2)
    calibrate(model, random_data(2, args.length // 4))  # warm
    state = PartialState()
    state.wait_for_everyone()
    wall, processor = time.perf_counter(), time.process_time()
    measured = calibrate(model, data)
    print(json.dumps({"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}))
    if state.is_main_process:
        measured.save(args.worker)
    state.destroy_process_group()


def loss_rows(args: argparse.Namespace, tokens: int = 4096) -> list[list[str]]:
    """Peak memory of the loss and its gradient besides the logits, each side in a process of its own."""
    peaks = {}
    for side, share in (("ours", 1), ("stock", 4)):  # the stock loss is linear in the tokens, and 8 GiB are a lot
        command = [sys.executable, sys.argv[0], "--loss", side, "--tokens", str(tokens // share)]
        peaks[side] = share * float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    logits = tokens * VOCABULARY * 2
    name = f"memory of the loss, {tokens:,} tokens x {VOCABULARY:,}, bfloat16"
    return [
        [name, "all at once", "calibration", f"{peaks['stock'] / peaks['ours']:.0f}", ""],
        [name, "calibration", f"the logits ({logits / 2**30:.2f} GiB)", f"{peaks['ours'] / logits:.2f}", ""],
    ]


def peak_of_loss(side: str, tokens: int) -> None:
    """Prints the bytes that the loss takes at most besides the logits."""
    logits = torch.empty(1, tokens, VOCABULARY, dtype=torch.bfloat16).fill_(0.5).requires_grad_(True)
    ids = torch.arange(tokens)[None]
    before = peak_memory()
    if side == "ours":
        summed_token_loss(logits, ids, torch.ones_like(ids))[0].backward()
    else:
        from transformers.loss.loss_utils import ForCausalLMLoss

        ForCausalLMLoss(logits, ids, VOCABULARY).backward()
    print(peak_memory() - before)


def peak_memory() -> int:
    """Bytes that this process had in memory at most. (What `resource` says begins with the peak of the parent.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def ranking_rows(args: argparse.Namespace) -> list[list[str]]:
    """Spearman's correlation of the scores of a trained model in half precision with those in float32."""
    config = HeaprConfig(dataset=args.text, num_samples=128, seq_length=256, batch_size=8)
    flat = {}
    for name in ("float32", "bfloat16", "float16"):
        measured = HeaprPruner.from_pretrained(args.model, config, dtype=getattr(torch, name)).calibrate()
        scores = importance(measured, "heapr")
        flat[name] = torch.cat([scores[path][block.reached].flatten() for path, block in measured.blocks.items()])
    rows = []
    for name in ("bfloat16", "float16"):
        ranks = [flat[side].argsort().argsort().double() for side in (name, "float32")]
        rows.append([f"rank correlation, {flat[name].numel():,} scores", name, "float32"])
        rows[-1] += [f"{torch.corrcoef(torch.stack(ranks))[0, 1]:.5f}", ">= 0.999"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048, help="tokens in a sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--model", help="trained model for the rankings in half precision")
    parser.add_argument("--text", help="its calibration text")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--loss", choices=("ours", "stock"), help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("optimum.heapr").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if args.worker:
        return work(args)
    if args.loss:
        return peak_of_loss(args.loss, args.tokens)
    measure = {"cost": cost_rows, "processes": process_rows, "loss": loss_rows, "ranking": ranking_rows}
    rows = [row for part in args.parts if part != "ranking" or args.model for row in measure[part](args)]
    print(f"hidden {args.hidden}, {args.experts} experts x {args.width}, {args.top_k} a token, {args.layers} layers")
    print(table(["quantity", "of", "as a multiple of", "ratio", "target"], rows))


if __name__ == "__main__":
    main()
