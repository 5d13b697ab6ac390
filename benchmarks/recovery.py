# Licensed under the Apache License, Version 2.0
"""What each stage wins back: pruning, compensation, LoRA with cross-entropy, LoRA with distillation, on the same windows.

    python benchmarks/recovery.py --model PATH --calibration calibration.jsonl \\
        --in-domain code=eval_code.jsonl prose=eval_prose.jsonl --out-of-domain sql=eval_sql.jsonl --output recovery

Prints one table and writes it as `recovery.md`, everything measured as `recovery.json`. Calibration and training read the
calibration text alone, and part of its documents is held out to choose what is kept. The loss increase is over the
unpruned model, in nats a token, the mean over the sets of a domain; its standard error is that of the paired differences
of windows. `--targets` measures what the presets of targets give.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from quality import Increase, evaluation_windows, named_paths, prune, window_losses

from optimum_heapr import AtomicStatistics, HeaprConfig, HeaprPruner
from optimum_heapr.loading import load_model
from optimum_heapr.recovery.configuration import TARGETS, RecoveryConfig
from optimum_heapr.recovery.data import RecoveryData
from optimum_heapr.recovery.runner import recover
from optimum_heapr.recovery.state import RunFolder
from optimum_heapr.recovery.teacher import Teacher


HEAPR = {"criterion": "heapr"}
COMPENSATED = {"criterion": "heapr", "compensate": True}
RECOMMENDED = {"criterion": "obs", "compensate": True}
CROSS_ENTROPY: dict = {}
DISTILLATION = {"cross_entropy_weight": 0.0, "distillation_weight": 1.0}

# Name: options of HeaprConfig, and of RecoveryConfig where there is training.
STAGES: dict[str, tuple[dict, dict | None]] = {
    "(a) HEAPr": (HEAPR, None),
    "(b) (a) + compensation": (COMPENSATED, None),
    "(c) (b) + LoRA, cross-entropy": (COMPENSATED, CROSS_ENTROPY),
    "(d) (b) + LoRA, distillation": (COMPENSATED, DISTILLATION),
    "(b') OBS + compensation": (RECOMMENDED, None),
    "(c') (b') + LoRA, cross-entropy": (RECOMMENDED, CROSS_ENTROPY),
    "(d') (b') + LoRA, distillation": (RECOMMENDED, DISTILLATION),
}


def train(pruned, teacher, config: RecoveryConfig, data: RecoveryData):
    """The recovered model and the report of its run."""
    with tempfile.TemporaryDirectory() as folder:
        recovery = recover(pruned, config, data, RunFolder(folder, resume=True), teacher)
        return recovery.merge(), recovery.report


def markdown(result: dict) -> str:
    """A row for each stage, a column for each domain and ratio, and what the training took."""
    ratios = sorted({record["ratio"] for record in result["records"]})
    columns = [(domain, ratio) for domain in result["domains"] for ratio in ratios]
    header = [f"{domain}, {ratio:.0%}" for domain, ratio in columns] + [f"minutes, {ratio:.0%}" for ratio in ratios]
    lines = ["| stage | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
    for stage in dict.fromkeys(record["stage"] for record in result["records"]):
        found = {record["ratio"]: record for record in result["records"] if record["stage"] == stage}
        cells = [
            str(Increase(**found[ratio]["increase"][domain])) if ratio in found else "" for domain, ratio in columns
        ]
        cells += [f"{found[ratio]['cpu_minutes']:.1f}" if ratio in found else "" for ratio in ratios]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(stack: ExitStack) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-m", "--model", required=True, help="folder or name on the Hub")
    parser.add_argument("--calibration", required=True, help="text to calibrate on and to train on")
    parser.add_argument("--in-domain", nargs="+", required=True, metavar="NAME=PATH", help="evaluation texts")
    parser.add_argument("--out-of-domain", nargs="*", default=[], metavar="NAME=PATH", help="evaluation texts")
    parser.add_argument("-o", "--output", default="recovery", help="path of the results, without ending")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.7])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["all"], help="presets, compared")
    parser.add_argument("--num-samples", type=int, default=512, help="calibration samples")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens in a sample and in an evaluation window")
    parser.add_argument("--rows", type=int, default=24, help="evaluation windows of each text")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=RecoveryConfig.max_steps)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="the default is one for small models")
    parser.add_argument("--rank", type=int, default=RecoveryConfig.rank)
    parser.add_argument("--temperature", type=float, default=RecoveryConfig.temperature)
    parser.add_argument("--top-k-logits", type=int, default=512)
    parser.add_argument("--statistics", help="statistics file to use, or to write if there is none")
    parser.add_argument("--teacher-cache", help="folder for the output of the teacher, which serves several runs")
    parser.add_argument("--resume", action="store_true", help="keep what the output holds and measure what is missing")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model, dtype="float32")
    common = {"dataset": args.calibration, "seq_length": args.seq_length}
    if args.statistics and Path(args.statistics).is_file():
        statistics = AtomicStatistics.load(args.statistics)
    else:
        options = {"num_samples": args.num_samples, "batch_size": args.batch_size, "statistics": "gram"}
        statistics = HeaprPruner(model, tokenizer, HeaprConfig(**common, **options)).calibrate()
        if args.statistics:
            statistics.save(args.statistics)
    config = RecoveryConfig(
        **common,
        num_samples=100_000,  # all there are
        held_out=0.05,
        batch_size=args.batch_size,
        micro_batch_size=args.batch_size,
        max_steps=args.max_steps,
        eval_steps=max(1, args.max_steps // 3),
        learning_rate=args.learning_rate,
        rank=args.rank,
        temperature=args.temperature,
        top_k_logits=args.top_k_logits,
    )
    data = RecoveryData.load(config, tokenizer)

    in_domain, out_of_domain = named_paths(args.in_domain), named_paths(args.out_of_domain)
    domains = {"in domain": list(in_domain), **({"out of domain": list(out_of_domain)} if out_of_domain else {})}
    windows = {
        name: evaluation_windows(path, tokenizer, args.rows, args.seq_length)
        for name, path in {**in_domain, **out_of_domain}.items()
    }
    base = window_losses(model, windows, args.batch_size)
    result = {
        "domains": domains,
        "unpruned_loss": {name: float(losses.mean()) for name, losses in base.items()},
        "calibration": statistics.fingerprint,
        "training": {"samples": len(data.training.samples), "held_out": len(data.held_out.samples)},
        "config": config.to_dict(),
        "records": [],
    }
    output = Path(f"{args.output}.json")
    if args.resume and output.is_file():
        result["records"] = json.loads(output.read_text())["records"]
    known = {(record["stage"], record["ratio"]) for record in result["records"]}
    cache = RunFolder(args.teacher_cache or stack.enter_context(tempfile.TemporaryDirectory()), resume=True)
    began = time.process_time()
    teacher = Teacher.prepare(model, model, config.replace(cache_teacher=True, **DISTILLATION), data, cache)
    result["teacher_cpu_minutes"] = (time.process_time() - began) / 60
    runs = [
        (stage if targets == "all" or STAGES[stage][1] is None else f"{stage}, {targets}", stage, targets)
        for stage in args.stages
        for targets in (args.targets if STAGES[stage][1] is not None else ["all"])
    ]
    for ratio in args.ratios:
        for name, stage, targets in runs:
            if (name, ratio) in known:
                continue
            pruning, training = STAGES[stage]
            pruned, _ = prune(model, statistics, pruning, ratio)
            began, report = (time.perf_counter(), time.process_time()), None
            if training is not None:
                pruned, report = train(pruned, teacher, config.replace(targets=targets, **training), data)
            wall, cpu = (now - then for now, then in zip((time.perf_counter(), time.process_time()), began))
            losses = window_losses(pruned.eval(), windows, args.batch_size)
            found = {domain: Increase.over(losses, base, windows, sets) for domain, sets in domains.items()}
            print(f"{name:40s} {ratio:.0%}  " + "  ".join(f"{k} {v}" for k, v in found.items()), flush=True)
            result["records"].append(
                {
                    "stage": name,
                    "ratio": ratio,
                    "increase": {domain: vars(increase) for domain, increase in found.items()},
                    "by_set": {set_: float((losses[set_] - base[set_]).mean()) for set_ in losses},
                    "cpu_minutes": cpu / 60,
                    "wall_minutes": wall / 60,
                    "trained_parameters": report.trained_parameters if report else 0,
                    "history": report.history if report else [],
                    "start": list(report.stages.values())[-2] if report else None,
                    "improved": report.improved if report else None,
                }
            )
            output.write_text(json.dumps(result, indent=1) + "\n")
            Path(f"{args.output}.md").write_text(markdown(result))
    print("\n" + markdown(result))


if __name__ == "__main__":
    with ExitStack() as stack:
        main(stack)
