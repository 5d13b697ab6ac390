# Licensed under the Apache License, Version 2.0
"""What each stage wins back: pruning, compensation, LoRA with cross-entropy, LoRA with distillation, on the same windows.

    python benchmarks/recovery.py --model PATH --calibration calibration.jsonl \\
        --in-domain code=eval_code.jsonl prose=eval_prose.jsonl --out-of-domain sql=eval_sql.jsonl --output recovery

Prints one table and writes it as `recovery.md`, everything measured as `recovery.json`. Calibration and training read the
calibration text alone, and part of its documents is held out to choose what is kept. `recovery.json` has the paired
differences before and after the training, too. `--targets` measures what the presets of targets give, and
`--weight-interpolation` what parts of one and the same update do.
"""

from __future__ import annotations

import copy
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace

from common import (
    Evaluation,
    Results,
    argument_parser,
    calibration_samples,
    load,
    load_or_measure,
    prune,
    window_losses,
)

from optimum_heapr.recovery.adapter import interpolate
from optimum_heapr.recovery.configuration import TARGETS, RecoveryConfig
from optimum_heapr.recovery.data import RecoveryData
from optimum_heapr.recovery.runner import Recovery, recover
from optimum_heapr.recovery.state import RunFolder
from optimum_heapr.recovery.teacher import Teacher


HEAPR = {"criterion": "heapr"}
COMPENSATED = {"criterion": "heapr", "compensate": True}
RECOMMENDED = {"criterion": "obs", "compensate": True, "compensation_scope": "block"}
CROSS_ENTROPY: dict = {}
DISTILLATION = {"cross_entropy_weight": 0.0, "distillation_weight": 1.0}

# Name: options of HeaprConfig, and of RecoveryConfig where there is training.
STAGES: dict[str, tuple[dict, dict | None]] = {
    "(a) HEAPr": (HEAPR, None),
    "(b) (a) + compensation": (COMPENSATED, None),
    "(c) (b) + LoRA, cross-entropy": (COMPENSATED, CROSS_ENTROPY),
    "(d) (b) + LoRA, distillation": (COMPENSATED, DISTILLATION),
    "(b') OBS + compensation over blocks": (RECOMMENDED, None),
    "(c') (b') + LoRA, cross-entropy": (RECOMMENDED, CROSS_ENTROPY),
    "(d') (b') + LoRA, distillation": (RECOMMENDED, DISTILLATION),
}


def train(pruned, teacher, config: RecoveryConfig, data: RecoveryData) -> Recovery:
    with tempfile.TemporaryDirectory() as folder:
        return recover(pruned, config, data, RunFolder(folder, resume=True), teacher)


def with_part(recovery: Recovery, share: float):
    """The recovered model with a share of the update, merged; the recovery stays as it is."""
    part = copy.deepcopy(recovery)
    interpolate(part.model, share)
    return part.merge()


def main(stack: ExitStack) -> None:
    parser = argument_parser(__doc__, "recovery", ratios=(0.5, 0.7), num_samples=512, statistics=True, resume=True)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["all"], help="presets, compared")
    parser.add_argument("--weight-interpolation", nargs="+", type=float, default=[1.0, 0.75, 0.5], help="compared")
    parser.add_argument("--max-steps", type=int, default=1200)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="the default is one for small models")
    parser.add_argument("--rank", type=int, default=RecoveryConfig.rank)
    parser.add_argument("--temperature", type=float, default=RecoveryConfig.temperature)
    parser.add_argument("--top-k-logits", type=int, default=512)
    parser.add_argument("--teacher-cache", help="folder for the output of the teacher, which serves several runs")
    args = parser.parse_args()

    model, tokenizer = load(args)
    statistics, samples = load_or_measure(args, model, tokenizer), calibration_samples(args, tokenizer)
    config = RecoveryConfig(
        dataset=args.calibration,
        seq_length=args.seq_length,
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

    evaluation = Evaluation.of(args, model, tokenizer)
    cache = RunFolder(args.teacher_cache or stack.enter_context(tempfile.TemporaryDirectory()), resume=True)
    began = time.process_time()
    teacher = Teacher.prepare(model, model, config.replace(cache_teacher=True, **DISTILLATION), data, cache)
    teacher_minutes = (time.process_time() - began) / 60
    runs = [
        (stage if targets == "all" or STAGES[stage][1] is None else f"{stage}, {targets}", stage, targets)
        for stage in args.stages
        for targets in (args.targets if STAGES[stage][1] is not None else ["all"])
    ]
    shares = {
        name: {name if share == 1 else f"{name}, {share:g} of it": share for share in args.weight_interpolation}
        for name, stage, _ in runs
        if STAGES[stage][1] is not None
    }
    rows = [row for name, _, _ in runs for row in shares.get(name, [name])]
    about = {
        **evaluation.measured_on(),
        "calibration": statistics.fingerprint,
        "training": {"samples": len(data.training.samples), "held_out": len(data.held_out.samples)},
        "config": config.to_dict(),
        "teacher_cpu_minutes": teacher_minutes,
    }
    results = Results(args.output, about, rows, columns={"cpu_minutes": ".1f"})
    if args.resume:
        results.resume()
    for ratio in args.ratios:
        for name, stage, targets in runs:
            if all(results.has(row, ratio) for row in shares.get(name, [name])):
                continue
            pruning, training = STAGES[stage]
            pruned, _ = prune(model, statistics, pruning, ratio, samples)
            if training is None:
                results.add(method=name, ratio=ratio, **evaluation.measure(pruned.eval()), cpu_minutes=0.0)
                continue
            untrained = replace(evaluation, base=window_losses(pruned.eval(), evaluation.windows, args.batch_size))
            began = time.perf_counter(), time.process_time()
            recovery = train(pruned, teacher, config.replace(targets=targets, **training), data)
            wall, cpu = (now - then for now, then in zip((time.perf_counter(), time.process_time()), began))
            report = recovery.report
            for row, share in shares[name].items():
                if results.has(row, ratio):
                    continue
                recovered = with_part(recovery, share)
                results.add(
                    method=row,
                    ratio=ratio,
                    **evaluation.measure(recovered),
                    increase_by_training=untrained.measure(recovered)["increase"],
                    cpu_minutes=cpu / 60,
                    wall_minutes=wall / 60,
                    trained_parameters=report.trained_parameters,
                    history=report.history,
                    start=list(report.stages.values())[-2],
                    improved=report.improved,
                )
    print("\n" + results.markdown())


if __name__ == "__main__":
    with ExitStack() as stack:
        main(stack)
