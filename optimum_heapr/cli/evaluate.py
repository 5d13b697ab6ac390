# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr evaluate`: perplexity, benchmarks and speed of one or several models, side by side."""

from __future__ import annotations

from typing import Any

from ..utils.errors import HeaprError
from .base import HeaprSubcommand
from .checks import say_unused
from .options import add_model_options, model_options_from


_NEEDS = {
    **dict.fromkeys(("dataset_config", "split", "text_column", "num_samples", "seq_length"), ("dataset",)),
    **dict.fromkeys(("include_path", "num_fewshot", "limit", "chat_template"), ("tasks",)),
    **dict.fromkeys(("prompt_length", "new_tokens", "repetitions"), ("speed",)),
    "batch_size": ("tasks", "speed"),
}


class EvaluateCommand(HeaprSubcommand):
    NAME = "evaluate"
    HELP = "Perplexity, benchmarks and speed of any causal language model, pruned or not; several are compared."

    @staticmethod
    def parse_args(parser):
        add_model_options(parser, several=True)
        text = parser.add_argument_group("Perplexity")
        text.add_argument(
            "--dataset",
            nargs="+",
            default=[],
            help="local file, dataset on the Hub, 'demo', or wikitext2 or ptb as in the paper; several are compared",
        )
        text.add_argument("--dataset-config", default=None, help="configuration of a dataset on the Hub")
        text.add_argument("--split", default="test", help="split of a dataset on the Hub (default: test)")
        text.add_argument("--text-column", default="text", help="column that holds the text (default: text)")
        text.add_argument("--num-samples", type=int, default=None, help="windows from the beginning (default: all)")
        text.add_argument("--seq-length", type=int, default=2048, help="tokens in a window (default: 2048)")
        tasks = parser.add_argument_group("Benchmarks", 'of lm-evaluation-harness: pip install "optimum-heapr[eval]"')
        tasks.add_argument(
            "--tasks",
            nargs="+",
            default=[],
            help="names of tasks, or 'paper' for its seven zero-shot ones, or 'generation' for gsm8k and ifeval",
        )
        tasks.add_argument(
            "--include-path", default=None, help="folder of your own task files, whose Python functions are run"
        )
        tasks.add_argument(
            "--num-fewshot", type=int, default=None, help="examples in the prompt (default: the task's)"
        )
        tasks.add_argument("--limit", type=int, default=None, help="documents of each task, for a quick look")
        tasks.add_argument("--chat-template", action="store_true", help="render requests by the chat template")
        speed = parser.add_argument_group("Speed")
        speed.add_argument(
            "--speed",
            action="store_true",
            help="also sizes, FLOPs a token, tokens a second and, on CUDA devices, peak memory",
        )
        speed.add_argument("--prompt-length", type=int, default=512, help="tokens of a prompt (default: 512)")
        speed.add_argument("--new-tokens", type=int, default=64, help="tokens written after each (default: 64)")
        speed.add_argument("--repetitions", type=int, default=5, help="of which the median counts (default: 5)")
        parser.add_argument("--batch-size", type=int, default=1, help="of benchmarks and speed (default: 1)")

    def execute(self) -> Any:
        args = self.args
        if not (args.dataset or args.tasks or args.speed):
            raise HeaprError("dataset=[]: nothing to evaluate; name text with --dataset, --tasks, or --speed")
        if args.num_samples is not None and args.num_samples < 1:
            raise HeaprError(f"num_samples={args.num_samples}: must be at least 1; leave it out for all windows")
        say_unused(args, self.parser, _NEEDS)
        from ..checkpoints.loading import load_model
        from ..checkpoints.origins import load_configuration
        from ..evaluation.comparison import Comparison
        from ..evaluation.perplexity import open_evaluation_text
        from ..utils.placement import place
        from .tables import perplexity_table, speed_table, storage_table, tasks_table

        names = ("seq_length", "num_samples", "dataset_config", "split", "text_column")
        task_names = ("include_path", "num_fewshot", "limit", "batch_size", "chat_template")
        speed_names = ("prompt_length", "new_tokens", "batch_size", "repetitions")
        comparison = Comparison(
            args.dataset,
            {name: getattr(args, name) for name in names},
            args.tasks,
            {name: getattr(args, name) for name in task_names},
            {name: getattr(args, name) for name in speed_names} if args.speed else None,
        )
        for dataset in args.dataset:  # before minutes are spent on loading
            open_evaluation_text(dataset, args.dataset_config, args.split, args.text_column)
        for name in args.model if len(args.model) > 1 else ():  # the last one before the first is measured
            load_configuration(name, **model_options_from(args))
        for name in args.model:
            model, tokenizer = load_model(name, allow_quantized=True, **model_options_from(args))
            comparison.add(name, place(model), tokenizer, self._weight_files(model) if args.speed else ())
            del model  # the next one may need its memory
        tables = {"perplexity": perplexity_table, "tasks": tasks_table, "speed": speed_table, "storage": storage_table}
        found = comparison.results
        self.show(*(made(found[kind]) for kind, made in tables.items() if found[kind]), sep="\n\n")
        return found

    def _weight_files(self, model) -> list[str]:
        """The files that a model was loaded from; none if they are not safetensors."""
        from ..utils.tensor_files import checkpoint_files

        options = {"revision": self.args.revision} if self.args.revision else {}
        try:
            return checkpoint_files(model.config._name_or_path, **options)
        except (HeaprError, OSError):
            return []
