# Licensed under the Apache License, Version 2.0
"""What commands and imports take that do no work: processor seconds of a process, the best of a few, started in turn."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from optimum_heapr import HeaprConfig, HeaprPruner


def seconds(arguments: list[str]) -> float:
    """Processor seconds of a process, its own and those of the system for it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = HeaprConfig(dataset="demo", num_samples=4, seq_length=128, eval_samples=1)
        pruner = HeaprPruner.from_pretrained("demo", config, dtype="float32")
        pruner.prune()
        own = pruner.save_pretrained(Path(folder) / "pruned") / "heapr"
        cli = ["-m", "optimum.commands.optimum_cli"]
        measured = {
            "`optimum-cli --help`": [*cli, "--help"],
            "`optimum-cli heapr prune --help`": [*cli, "heapr", "prune", "--help"],
            "`inspect`, a report": [*cli, "heapr", "inspect", str(own / "report.json")],
            "`inspect`, a plan": [*cli, "heapr", "inspect", str(own / "plan.safetensors")],
            "`inspect`, statistics": [*cli, "heapr", "inspect", str(own / "statistics.safetensors")],
            "`plan --dry-run`": [*cli, "heapr", "plan", "-s", str(own / "statistics.safetensors"), "--dry-run"],
            "import of torch": ["-c", "import torch"],
            "import of `AutoModelForCausalLM`": ["-c", "from transformers import AutoModelForCausalLM"],
            "import of `HeaprPruner`": ["-c", "from optimum_heapr import HeaprPruner"],
        }
        rounds = [{name: seconds(command) for name, command in measured.items()} for _ in range(args.repetitions)]
    print("| | processor seconds |\n|---|---|")
    for name in measured:
        print(f"| {name} | {min(found[name] for found in rounds):.2f} |")


if __name__ == "__main__":
    main()
