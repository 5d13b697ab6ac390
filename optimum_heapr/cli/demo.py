# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr demo`: the whole job on the embedded model, against two baselines. Needs no network."""

from __future__ import annotations

from typing import Any

from .base import HeaprSubcommand
from .options import number


SAMPLES, EVALUATED = 64, 48
"""Windows of 256 tokens that are calibrated on, and that each model is evaluated on."""


class DemoCommand(HeaprSubcommand):
    NAME = "demo"
    HELP = "Run the whole job on a small embedded model: no download, under two minutes."

    @staticmethod
    def parse_args(parser):
        parser.add_argument(
            "-o", "--output", default=None, help="folder for the pruned model (default: a temporary one)"
        )
        parser.add_argument("--overwrite", action="store_true", help="replace an output that this package wrote")
        parser.add_argument("--ratio", type=number, default=0.25, help="share of the atomic experts to remove (0.25)")

    def execute(self) -> Any:
        import tempfile

        from ..configuration import HeaprConfig
        from ..demo import DEMO_MODEL
        from ..utils.files import check_output_folder

        config = HeaprConfig(
            ratio=self.args.ratio, dataset=DEMO_MODEL, num_samples=SAMPLES, seq_length=256, batch_size=8
        )
        if self.args.output:
            check_output_folder(self.args.output, self.args.overwrite)
            return self._run(config, self.args.output)
        with tempfile.TemporaryDirectory() as folder:
            return self._run(config, f"{folder}/pruned")

    def _run(self, config, output: str) -> dict[str, Any]:
        from pathlib import Path

        import torch
        from transformers import AutoModelForCausalLM

        from ..demo import DEMO_MODEL, demo_model_path
        from ..evaluation.perplexity import evaluate_perplexity
        from ..pruner import HeaprPruner
        from .documents import plan_document
        from .tables import plan_table, table

        torch.set_num_threads(1)  # matrices this small only lose time when threads share them

        def measured(name: str, model, folder: Path | None = None) -> dict[str, Any]:
            result = evaluate_perplexity(model, pruner.tokenizer, DEMO_MODEL, config.seq_length, num_samples=EVALUATED)
            size = sum(file.stat().st_size for file in folder.glob("model*.safetensors")) if folder else None
            return {"model": name, "parameters": model.num_parameters(), "num_bytes": size, **result}

        # Measured in float32, which CPUs are faster at; stored in the bfloat16 that the model came in.
        float32 = {"dtype": "float32"}
        pruner = HeaprPruner.from_pretrained(DEMO_MODEL, config, **float32)
        print(f"Calibrating the embedded model on {config.num_samples} x {config.seq_length} tokens ...")
        statistics = pruner.calibrate()
        models = [measured("unpruned", pruner.model, demo_model_path())]
        for criterion in ("random", "magnitude"):
            baseline = config.replace(criterion=criterion, eval_samples=0)  # nobody reads the reports of these
            pruner = HeaprPruner.from_pretrained(DEMO_MODEL, baseline, **float32)
            pruner.statistics = statistics
            models.append(measured(criterion, pruner.prune()))
        pruner = HeaprPruner.from_pretrained(DEMO_MODEL, config)
        pruner.statistics = statistics
        pruner.prune()
        pruner.save_pretrained(output, self.args.overwrite)
        reloaded = AutoModelForCausalLM.from_pretrained(output, **float32)
        models.append(measured("heapr, saved and reloaded", reloaded, Path(output)))

        plan = pruner.applied_plan
        rows = [
            [
                found["model"],
                f"{found['parameters']:,}",
                f"{found['num_bytes']:,}" if found["num_bytes"] else "",
                f"{found['perplexity']:.3f}",
                f"{found['loss']:.4f}",
            ]
            for found in models
        ]
        header = ["model", "parameters", "bytes in bfloat16", "perplexity", "loss"]
        self.show(plan_table(plan), "", table(header, rows))
        if self.args.output:
            print(f"\nPruned model written to {output}")
        return {"output": self.args.output, "models": models, **plan_document(plan, DEMO_MODEL)}
