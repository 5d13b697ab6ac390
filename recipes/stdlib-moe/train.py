# Licensed under the Apache License, Version 2.0
"""Train a small Mixture-of-Experts model with many narrow experts from scratch, on texts that every Python has.

    python recipes/stdlib-moe/train.py --output stdlib-moe

A DeepSeek-V3 of 64 routed experts a layer, 8 a token, and a shared one, on the sources and help texts of the standard
library; a quarter of an hour of one core, without a download. A run that was interrupted goes on with `--resume`. Beside the
weights it writes `calibration.jsonl` and `evaluation.jsonl`, of modules that were not trained on, and where the headers
of C extensions are installed `headers.jsonl`, which is another kind of text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from optimum_heapr.cli.wording import in_flags
from optimum_heapr.demo import demo_model_path, demo_texts
from optimum_heapr.recovery.state import RunFolder
from optimum_heapr.utils.errors import HeaprError
from optimum_heapr.utils.files import beside, check_output_folder, replace_folder


SEQUENCE_LENGTH = 256
HEADER_CHARS = 10_000  # of each header, as of each document of the other small splits


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model, the tokenizer and texts")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints of an interrupted run")
    parser.add_argument("--steps", type=int, default=1400, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--save-steps", type=int, default=200, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="samples of a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its peak (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(arguments)
    for name in ("steps", "save_steps", "batch_size", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    if not (0 < args.learning_rate and math.isfinite(args.learning_rate)):
        parser.error(f"--learning-rate {args.learning_rate}: must be above 0 and finite")
    return args


def build_model(tokenizer: PreTrainedTokenizerBase) -> DeepseekV3ForCausalLM:
    """The untrained model: a dense layer, then 4 of 64 experts with 32 neurons each, 8 a token, and a shared expert."""
    config = DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,  # of the dense layer
        num_hidden_layers=5,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=48,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=32,
        n_shared_experts=2,  # one of twice the width
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=0,
        max_position_embeddings=512,
        initializer_range=0.05,  # the usual 0.02 suits wider layers; here it would only slow the start down
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return DeepseekV3ForCausalLM._from_config(config, experts_implementation="grouped_mm")


class BalanceExperts(TrainerCallback):
    """Keeps the experts of each layer equally busy without a further loss, as DeepSeek-V3 was trained (arXiv 2408.15664).

    After each step the bias that an expert has in the choice alone goes up where it got fewer tokens than the mean, and
    down where it got more. The biases are buffers of the model, and so in its checkpoints.

    Args:
        model (`nn.Module`): whose routers are watched in training.
        rate (`float`): of a step; the scores that the bias is added to lie between 0 and 1.
    """

    def __init__(self, model: torch.nn.Module, rate: float = 3e-3):
        self.rate, self.counts = rate, {}
        self.busiest = math.nan  # tokens of the busiest expert in the last step, over the mean of its layer
        for module in model.modules():
            if isinstance(module, DeepseekV3TopkRouter):
                module.register_forward_hook(self._count)

    def _count(self, router: torch.nn.Module, _inputs, outputs) -> None:
        if router.training:
            counts = torch.bincount(outputs[2].flatten(), minlength=router.num_experts)
            self.counts[router] = self.counts.get(router, 0) + counts

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        self.busiest = 0.0
        for router, counts in self.counts.items():
            load = counts / counts.float().mean()
            router.e_score_correction_bias += self.rate * torch.sign(1 - load)
            self.busiest = max(self.busiest, float(load.max()))
        self.counts.clear()


class Report(TrainerCallback):
    """One line for each evaluation."""

    def __init__(self, balance: BalanceExperts):
        self.balance = balance

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        trained = [entry["loss"] for entry in state.log_history if "loss" in entry]
        print(
            f"step {state.global_step}: training loss {trained[-1] if trained else math.nan:.3f}, "
            f"held-out loss {metrics['eval_loss']:.3f}, perplexity {math.exp(metrics['eval_loss']):.2f}, "
            f"busiest expert {self.balance.busiest:.2f} times the mean",
            flush=True,
        )


def samples(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[dict[str, torch.Tensor]]:
    """All texts in one row, an end-of-text token after each, cut into samples of `SEQUENCE_LENGTH` tokens."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    tokens = torch.tensor([token for encoding in encodings for token in (*encoding.ids, tokenizer.eos_token_id)])
    rows = tokens[: len(tokens) // SEQUENCE_LENGTH * SEQUENCE_LENGTH].view(-1, SEQUENCE_LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def header_texts() -> list[str]:
    """The beginnings of the headers of C extensions of the running Python; none where they are not installed."""
    texts = (path.read_text("utf-8", "replace") for path in sorted(Path(sysconfig.get_path("include")).rglob("*.h")))
    return [text[:HEADER_CHARS] for text in texts if len(text) >= 1000]


def training_arguments(args: argparse.Namespace, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=8,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        warmup_steps=max(args.steps // 30, 1),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=args.save_steps,
        logging_steps=args.save_steps,
        save_steps=args.save_steps,
        save_total_limit=2,
        seed=args.seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


def train(args: argparse.Namespace) -> None:
    """Raises `HeaprError` before any work if the output is taken, or if the checkpoints are of other settings."""
    check_output_folder(args.output)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    texts = {
        "calibration": demo_texts("calibration"),
        "evaluation": demo_texts("evaluation"),
        "headers": header_texts(),
    }
    training, held_out = samples(tokenizer, demo_texts("train")), samples(tokenizer, texts["evaluation"])
    settings = {name: getattr(args, name) for name in ("steps", "save_steps", "batch_size", "learning_rate", "seed")}
    with RunFolder(beside(args.output, ".run"), resume=args.resume) as folder:
        # A Trainer that goes on from a checkpoint does not put saved experts back, but keeps those that it is given.
        model = (
            DeepseekV3ForCausalLM.from_pretrained(folder.last_checkpoint)
            if folder.last_checkpoint
            else build_model(tokenizer)
        )
        folder.begin({**settings, "samples": len(training)})
        print(
            f"{len(training):,} samples of {SEQUENCE_LENGTH} tokens, {model.num_parameters():,} parameters", flush=True
        )
        balance = BalanceExperts(model)
        trainer = Trainer(
            model,
            training_arguments(args, folder.path),
            data_collator=default_data_collator,
            train_dataset=training,
            eval_dataset=held_out[:64],
            callbacks=[balance, Report(balance)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=folder.last_checkpoint)
        loss = trainer.evaluate(held_out)["eval_loss"]
        with replace_folder(args.output) as output:
            model.save_pretrained(output)
            tokenizer.save_pretrained(output)
            (output / "trained.json").write_text(
                json.dumps({**settings, "held_out_loss": loss, "log": trainer.state.log_history}, indent=1) + "\n"
            )
            for name, documents in texts.items():
                if documents:
                    lines = (json.dumps({"text": text}) + "\n" for text in documents)
                    (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"held-out loss {loss:.4f} nats a token, {len(held_out) * SEQUENCE_LENGTH:,} tokens: {args.output}")


def main() -> None:
    try:
        train(parse_args())
    except HeaprError as error:
        sys.exit(
            f"error: {in_flags(str(error), make_parser())}"
        )  # to stderr; the status is that of the command line tools, below
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command with --resume goes on from the last checkpoint")


if __name__ == "__main__":
    main()
