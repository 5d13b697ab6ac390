# Licensed under the Apache License, Version 2.0
"""What a run costs, in this checkout and in an older one, measured side by side.

    git worktree add ../old 76aee22
    python benchmarks/speed.py ../old --model MODEL --text calibration.jsonl

Each side is a process of its own on one thread; they take turns, and each works while the other waits. Times are processor
seconds, the median over rounds, and seconds on the wall in brackets; memory is what the process has at most beyond what it
had before, in MB. Every side makes the same random numbers. `--model` and `--text` are for whole jobs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


def routed_rows(experts: int = 128, top_k: int = 8, tokens: int = 2048) -> tuple[torch.Tensor, list[int]]:
    chosen = torch.rand(tokens, experts).topk(top_k).indices
    expert = chosen.flatten().sort().values
    return expert, torch.bincount(expert, minlength=experts).tolist()


def accumulation(width: int, gram: bool):
    """One block of 128 experts with 2,048 tokens, 8 experts a token."""
    expert, counts = routed_rows()
    h, g = torch.randn(len(expert), width), 1e-3 * torch.randn(len(expert), width)
    weight, norm = torch.rand(2, len(expert))
    try:
        from optimum_heapr.calibration.accumulator import BlockAccumulator, RoutedRows

        routed = RoutedRows(expert, counts, weight, None, norm)
    except ImportError:
        from optimum_heapr.calibration.tap import BlockAccumulator, _RoutedRows

        routed = _RoutedRows(counts, weight, None, norm)
    sums = BlockAccumulator(len(counts), width, torch.device("cpu"), gram=gram)
    return lambda: sums.add(h, g, routed)


def reading():
    """Nothing but going through the rows that the vectors are made of, at width 768."""
    h, g = torch.randn(2, 2048 * 8, 768)
    return lambda: (h.sum(), g.sum())


def random_statistics(layers: int, experts: int, width: int, matrices: bool = False):
    from optimum_heapr.calibration.statistics import AtomicStatistics, BlockStatistics

    blocks = {}
    for layer in range(layers):
        parts = (0.1 + torch.rand(experts, width) for _ in range(4))
        count = torch.full((experts,), 2 * width)
        block = BlockStatistics(*parts, count, torch.rand(experts))
        if matrices:
            for name in ("activation_gram_sum", "gradient_gram_sum"):
                rows = torch.randn(experts, 2 * width, width)
                setattr(block, name, rows.mT @ rows)
        blocks[f"model.layers.{layer}.mlp.experts"] = block
    model = {"num_parameters": 10**9, "parameters_per_atomic_expert": 1}
    return AtomicStatistics(blocks, {"model": model, "data": {"num_tokens": 2 * width * experts // 8}})


def plan_from_curves():
    """A layer of 16 experts x 768 with second-order statistics whose removal curves are there."""
    from optimum_heapr import HeaprConfig, PruningPlan
    from optimum_heapr.criteria.obs import store_removal_curves

    measured = random_statistics(1, 16, 768, matrices=True)
    store_removal_curves(measured)
    config = HeaprConfig(ratio=0.5, criterion="obs", compensate=True, compensation_scope="expert")
    return lambda: PruningPlan.build(measured, config)


def global_plan():
    """A global plan for the 18.5 million atomic experts of Qwen3-235B: 94 layers of 128 x 1536."""
    from optimum_heapr import HeaprConfig, PruningPlan

    measured = random_statistics(94, 128, 1536)
    return lambda: PruningPlan.build(measured, HeaprConfig(ratio=0.5))


def allocation():
    """Of that plan what follows the scores: which atomic experts stay."""
    from optimum_heapr import HeaprConfig
    from optimum_heapr.criteria import importance
    from optimum_heapr.planning.allocation import allocate

    scores = importance(random_statistics(94, 128, 1536), "heapr")
    return lambda: allocate(scores, HeaprConfig(ratio=0.5), {})


def shares():
    """What is recorded of a mixture of 4,000 samples."""
    try:
        from optimum_heapr.text.samples import CalibrationData
    except ImportError:
        from optimum_heapr.calibration.data import CalibrationData

    samples = list(torch.zeros(4000, 16, dtype=torch.int64))
    data = CalibrationData(samples, "mixture", 0, 16, ["abc"[index % 3] for index in range(4000)])
    return lambda: data.fingerprint


def elimination():
    """Removal curves of 16 experts x 768."""
    from optimum_heapr.criteria.elimination import greedy_elimination

    block = random_statistics(1, 16, 768, matrices=True).blocks["model.layers.0.mlp.experts"]
    grams = block.mean("activation_gram_sum"), block.mean("gradient_gram_sum")
    return lambda: greedy_elimination(*grams)


def compensation():
    """Half of 16 experts x 768 made up for within each expert, hidden size 2,048."""
    from optimum_heapr.surgery.compensation import compensate_experts

    block = random_statistics(1, 16, 768, matrices=True).blocks["model.layers.0.mlp.experts"]
    weights, gram = torch.randn(16, 2048, 768), block.mean("activation_gram_sum")
    kept = [torch.randperm(768)[:384].sort().values for _ in range(16)]
    return lambda: compensate_experts(weights, gram, kept, [10**6] * 16)


def block_fit(experts: int = 64, width: int = 128, hidden: int = 512, top_k: int = 8, tokens: int = 16384):
    """Half of a block of 64 experts x 128 made up for by all experts, 16,384 tokens, bfloat16 with a router in float32."""
    from optimum_heapr.experts import find_expert_blocks
    from optimum_heapr.surgery.block_compensation import fit_block
    from optimum_heapr.surgery.block_inputs import BlockInputs

    model = random_model(experts, width, hidden, top_k, layers=1).bfloat16()
    block = find_expert_blocks(model)[0]
    weight, index = torch.rand(tokens, experts).topk(top_k)
    states = torch.randn(tokens, 64) @ torch.randn(64, hidden)  # correlated, as those of a model are
    inputs, kept = BlockInputs({}), [torch.randperm(width)[: width // 2].sort().values for _ in range(experts)]
    calls = [(states.bfloat16(), index, weight / weight.sum(1, keepdim=True))]

    def work():
        inputs._routing = list(calls)  # a fit may use them up
        return model, fit_block(block, inputs, kept, 0.01)

    return work


def random_model(experts: int, width: int, hidden: int, top_k: int, layers: int):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
    )
    model = Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    model.set_experts_implementation("grouped_mm")
    return model


def floor():
    """Calibration with gradients down to the embeddings; `calibration.py` has the same for other shapes."""
    from optimum_heapr.calibration.runner import calibrate

    try:
        from optimum_heapr.text.samples import CalibrationData
    except ImportError:
        from optimum_heapr.calibration.data import CalibrationData

    model, data = random_model(128, 256, 512, 8, 2), CalibrationData([torch.randint(4096, (2048,))], "random", 0, 2048)
    model.enable_input_require_grads()
    return lambda: calibrate(model, data)


def bare():
    """The forward and backward of the same model down to the embeddings, with the loss of calibration."""
    from optimum_heapr.calibration.loss import summed_token_loss

    model, ids = random_model(128, 256, 512, 8, 2), torch.randint(4096, (1, 2048))

    def work():
        embeddings, mask = model.get_input_embeddings()(ids).requires_grad_(True), torch.ones_like(ids)
        logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
        summed_token_loss(logits, ids, mask)[0].backward()

    return work


def pruner_in_memory():
    """A random model of 1.1 GB in bfloat16, 20 layers of 32 experts x 256, hidden size 1,024, and a plan that halves it."""
    from datasets import Dataset

    from optimum_heapr import HeaprConfig, HeaprPruner

    model = random_model(32, 256, 1024, 4, layers=20).bfloat16()
    pruner = HeaprPruner(model, config=HeaprConfig(ratio=0.5, num_samples=1, seq_length=64))
    pruner.calibrate(Dataset.from_dict({"input_ids": [torch.arange(64).tolist()]}))
    return pruner, pruner.plan()


def applying():
    """Cutting that model, without measuring it."""
    pruner, plan = pruner_in_memory()
    return lambda: pruner.apply(plan) and None


def saving():
    """Writing it, once it is cut."""
    pruner, plan = pruner_in_memory()
    pruner.apply(plan)

    def work():
        with tempfile.TemporaryDirectory() as folder:
            pruner.save_pretrained(Path(folder) / "pruned", max_shard_size="100MB")

    return work


PHASES = (
    "import and load",
    "calibrate",
    "order",
    "plan",
    "compensate, cut, measure before and after",
    "save",
    "load again",
)


def whole_job(model: str, text: str, scope: str):
    """`obs`, compensation, measured before and after, saved, loaded again; gives the processor seconds of each phase."""

    def work():
        began = time.process_time()  # what the package imports, and when, is part of it
        from transformers import AutoModelForCausalLM

        from optimum_heapr import HeaprConfig, HeaprPruner
        from optimum_heapr.criteria.obs import store_removal_curves

        options = {"num_samples": 128, "seq_length": 256, "batch_size": 8, "criterion": "obs", "compensate": True}
        options["compensation_scope"] = scope
        config = HeaprConfig(dataset=text, **options)
        with tempfile.TemporaryDirectory() as folder:
            pruner = HeaprPruner.from_pretrained(model, config)
            steps = (
                lambda: pruner.calibrate(keep_grams=True),
                lambda: store_removal_curves(pruner.statistics),
                pruner.plan,
                lambda: pruner.apply(pruner.plan(), measure=True),
                lambda: pruner.save_pretrained(Path(folder) / "pruned"),
                lambda: AutoModelForCausalLM.from_pretrained(Path(folder) / "pruned"),
            )
            times = [time.process_time()]
            for step in steps:
                step()
                times.append(time.process_time())
        return dict(zip(PHASES, [times[0] - began, *(after - before for before, after in zip(times, times[1:]))]))

    return work


CASES = {
    "vectors-64": ("sums of one block, 128 experts x 64", lambda: accumulation(64, False), 0.15),
    "vectors-256": ("sums of one block, 128 experts x 256", lambda: accumulation(256, False), 0.15),
    "vectors-768": ("sums of one block, 128 experts x 768", lambda: accumulation(768, False), 0.15),
    "reading-768": ("reading these rows once, 128 experts x 768", reading, None),
    "gram-256": ("sums with matrices, 128 experts x 256", lambda: accumulation(256, True), 0.6),
    "gram-768": ("sums with matrices, 128 experts x 768", lambda: accumulation(768, True), 0.6),
    "calibration": ("calibration from the embeddings, 128 x 256, hidden 512, 8 a token", floor, None),
    "bare": ("a bare forward and backward of that model", bare, None),
    "curves": ("a plan from removal curves, width 768", plan_from_curves, 0.02),
    "plan": ("a global plan for 18.5 M atomic experts", global_plan, 0.4),
    "allocation": ("allocation of 18.5 M atomic experts", allocation, 0.4),
    "shares": ("shares of a mixture of 4,000 samples", shares, None),
    "elimination": ("removal curves, 16 experts x 768", elimination, 0.5),
    "compensation": ("compensation within experts, 16 x 768, hidden 2,048", compensation, 0.5),
    "fit": ("a block fitted as a whole, 64 x 128, hidden 512, 16,384 tokens", block_fit, None),
    "apply": ("cutting a model of 1.1 GB in memory", applying, None),
    "save": ("writing what is left of it, files of 100 MB", saving, None),
    "job": ("the whole job, compensation within experts", None, 0.5),
    "block-job": ("the whole recommended job, compensation over blocks", None, 0.5),
}
SCOPES = {"job": "expert", "block-job": "block"}
ONCE = ("apply", "save", *SCOPES)  # what is there afterwards is another thing, or it takes long


M_MMAP_THRESHOLD = -3  # of glibc


def status(name: str) -> int:
    """Bytes: `VmHWM` is the most that this process had in memory, `VmRSS` what it has."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def work(args: argparse.Namespace) -> None:
    """One side: does a case once for each line that it is given, and says what that took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    is_job = args.work in SCOPES
    case = whole_job(args.model, args.text, SCOPES[args.work]) if is_job else CASES[args.work][1]()
    for line in sys.stdin:
        # What is freed goes back to the system at once, or it would be there already for what comes next.
        if line == "memory\n" or args.work in ("apply", "save"):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, wall, processor = status("VmRSS"), time.perf_counter(), time.process_time()
        phases = case()
        found = [time.process_time() - processor, time.perf_counter() - wall, status("VmHWM") - before]
        print("took", json.dumps(found + list(phases.values() if is_job else [])), flush=True)


def measure(args: argparse.Namespace, case: str) -> dict[str, list[list[float]]]:
    """Seconds of the processor and on the wall of each round, by side, and bytes; a first round does not count, and a last one is for
    the bytes alone, save of what is done once."""
    here = Path(__file__).resolve().parents[1]
    command = [sys.executable, __file__, str(args.old), "--work", case]
    for option in ("model", "text"):
        command += [f"--{option}", getattr(args, option)] if getattr(args, option) else []
    sides = {
        name: subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name, folder in (("before", args.old.resolve()), ("now", here))
    }
    found: dict[str, list[list[float]]] = {name: [] for name in sides}
    rounds = ["count"] if case in ONCE else ["begin", *["count"] * args.rounds, "memory"]
    for kind in rounds:
        for name, process in sides.items():
            print(kind, file=process.stdin, flush=True)
            line = next((line for line in process.stdout if line.startswith("took ")), None)
            if line is None:
                sys.exit(f"{case}, {name}: ended with status {process.wait()}; run it alone with --work {case}")
            took = json.loads(line.removeprefix("took "))
            if kind == "count":
                found[name].append(took)
            elif kind == "memory":
                for counted in found[name]:
                    counted[2] = took[2]
    for process in sides.values():
        process.stdin.close()
        process.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the other checkout")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[name for name in CASES if name not in SCOPES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="trained model for the whole job")
    parser.add_argument("--text", help="its calibration text")
    parser.add_argument("--work", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args)
    print(
        "| what | before, s | now, s | ratio | target | memory before, MB | now, MB |\n|---|---|---|---|---|---|---|"
    )
    for case in args.cases:
        what, _, target = CASES[case]
        found = measure(args, case)
        middle = {side: [statistics.median(column) for column in zip(*rounds)] for side, rounds in found.items()}
        cells = [f"{middle[side][0]:.4f} ({middle[side][1]:.4f})" for side in found]
        cells += [f"{middle['now'][0] / middle['before'][0]:.3f}", f"<= {target}" if target else ""]
        cells += [f"{middle[side][2] / 1e6:.0f}" for side in found]
        print("| " + " | ".join([what, *cells]) + " |", flush=True)
        for phase, before, now in zip(PHASES, middle["before"][3:], middle["now"][3:]):
            print(f"| {phase} | {before:.2f} | {now:.2f} | {now / before:.2f} |", flush=True)


if __name__ == "__main__":
    main()
