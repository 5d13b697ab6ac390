# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr evaluate`: perplexity of one or several models on one or several texts."""

from __future__ import annotations

from .base import HeaprSubcommand, add_model_options, model_options_from


class EvaluateCommand(HeaprSubcommand):
    NAME = "evaluate"
    HELP = "Token-level perplexity of any causal language model, pruned or not."

    @staticmethod
    def parse_args(parser):
        add_model_options(parser, several=True)
        parser.add_argument(
            "--dataset",
            required=True,
            nargs="+",
            help="local file, dataset on the Hub, or 'demo'; several are compared",
        )
        parser.add_argument("--dataset-config", default=None, help="configuration of a dataset on the Hub")
        parser.add_argument("--split", default="test", help="split of a dataset on the Hub (default: test)")
        parser.add_argument("--text-column", default="text", help="column that holds the text (default: text)")
        parser.add_argument("--num-samples", type=int, default=None, help="windows from the beginning (default: all)")
        parser.add_argument("--seq-length", type=int, default=2048, help="tokens in a window (default: 2048)")
        parser.add_argument("--json", action="store_true", help="print JSON in place of a table")

    def execute(self) -> None:
        import json

        from ..evaluation.perplexity import evaluate_perplexity
        from ..pruner import load_model
        from ..utils.errors import HeaprError
        from .tables import table

        if self.args.num_samples is not None and self.args.num_samples < 1:
            raise HeaprError(f"num_samples={self.args.num_samples}: must be at least 1; leave it out for all windows")
        results = []
        for name in self.args.model:
            model, tokenizer = load_model(name, allow_quantized=True, **model_options_from(self.args))
            for dataset in self.args.dataset:
                result = evaluate_perplexity(
                    model,
                    tokenizer,
                    dataset,
                    self.args.seq_length,
                    self.args.num_samples,
                    self.args.dataset_config,
                    self.args.split,
                    self.args.text_column,
                )
                results.append({"model": name, "dataset": dataset, **result})
            del model
        if self.args.json:
            print(json.dumps(results, indent=2))
            return
        rows = [
            [row["model"], row["dataset"], f"{row['perplexity']:.3f}", f"{row['loss']:.4f}"]
            + [f"{row['loss_standard_error']:.4f}", row["num_tokens"]]
            for row in results
        ]
        print(table(["model", "dataset", "perplexity", "loss", "± s.e.", "tokens"], rows))
