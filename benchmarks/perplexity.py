# Licensed under the Apache License, Version 2.0
"""Perplexity of a pruned model on several texts, against random and magnitude pruning; one run, one table.

python benchmarks/perplexity.py --model PATH --calibration calibration.jsonl --texts code=code.jsonl prose=prose.jsonl
"""

import argparse

from common import named_paths

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.cli.tables import table
from optimum_heapr.evaluation.perplexity import evaluate_perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="demo", help="text, or rows of input_ids")
    parser.add_argument("--texts", nargs="+", default=["demo=demo"], help="NAME=FILE, each a column of the table")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--criteria", nargs="+", default=["random", "magnitude", "heapr"])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24, help="windows of each text")
    args = parser.parse_args()
    texts = named_paths(args.texts)
    config = HeaprConfig(
        dataset=args.calibration, num_samples=args.num_samples, seq_length=args.seq_length, batch_size=8
    )

    def perplexities(pruner: HeaprPruner) -> list[str]:
        results = (
            evaluate_perplexity(pruner.model, pruner.tokenizer, path, args.seq_length, args.windows)
            for path in texts.values()
        )
        return [f"{result['perplexity']:.2f}" for result in results]

    pruner = HeaprPruner.from_pretrained(args.model, config, dtype="float32")
    statistics = pruner.calibrate()
    rows = [["0 %", "unpruned", *perplexities(pruner)]]
    for ratio in args.ratios:
        for criterion in args.criteria:
            pruner = HeaprPruner.from_pretrained(args.model, config, dtype="float32")
            pruner.statistics = statistics
            pruner.prune(ratio=ratio, criterion=criterion)
            rows.append([f"{ratio:.0%}", criterion, *perplexities(pruner)])
    print(table(["removed", "criterion", *texts], rows))


if __name__ == "__main__":
    main()
