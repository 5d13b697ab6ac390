# Licensed under the Apache License, Version 2.0
"""Train the embedded demo model from scratch: a small Qwen3-MoE on the text of the Python standard library.

    python recipes/demo/train.py --output optimum_heapr/demo/model

Only a CPU is needed. `--steps` gives a reproducible run, `--minutes` one that fits a time budget.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from optimum_heapr.demo import demo_texts


END_OF_TEXT = "<|endoftext|>"
SEQUENCE_LENGTH = 256
BATCH_SIZE = 4  # many small steps: at this size they learn more from a token than few large ones
PEAK_LEARNING_RATE = 3e-3


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and the tokenizer")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=9300, help="optimizer steps (default: %(default)s)")
    length.add_argument("--minutes", type=float, help="wall-clock training time, instead of a number of steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser.parse_args()


def train_tokenizer(texts: list[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, whose token 0 serves as beginning, end and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return the token ids of all texts in one row, with the end-of-text token after each of them."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([token for encoding in encodings for token in (*encoding.ids, tokenizer.eos_token_id)])


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Build the untrained model: 4 layers of 16 experts with 64 neurons each, 4 experts a token."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,  # of dense layers, of which there are none
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=512,
        initializer_range=0.05,  # the usual 0.02 suits wider layers; here it would only slow the start down
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3MoeForCausalLM(config)
    # On a CPU slightly faster than "eager", and tens of times faster than "batched_mm".
    model.set_experts_implementation("grouped_mm")
    return model


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def learning_rate_factor(progress: float, warmup: float = 0.03, final: float = 0.02) -> float:
    """Linear warmup, then a cosine decay to `final`, as a function of the share of the training that is done."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def balance_loss(router_logits: tuple[torch.Tensor, ...], config: Qwen3MoeConfig) -> torch.Tensor:
    """Mean load-balancing loss of the layers, 1 where all experts of every layer are used equally.

    The loss that the model itself adds pools the layers, and so lets one layer make up for an expert that another
    one never uses.
    """
    sizes = config.num_experts, config.num_experts_per_tok
    losses = [load_balancing_loss_func((logits,), *sizes) for logits in router_logits]
    return torch.stack(losses).mean() / config.num_experts_per_tok


@torch.no_grad()
def perplexity(model: Qwen3MoeForCausalLM, tokens: torch.Tensor, batch_size: int = 16) -> float:
    """Perplexity on the tokens, cut into sequences of the training length."""
    model.eval()
    sequences = tokens[: len(tokens) // SEQUENCE_LENGTH * SEQUENCE_LENGTH].view(-1, SEQUENCE_LENGTH)
    loss = sum(model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in sequences.split(batch_size))
    model.train()
    return math.exp(loss / len(sequences))


def train(
    model: Qwen3MoeForCausalLM, tokens: torch.Tensor, evaluation: torch.Tensor, args: argparse.Namespace
) -> None:
    """Train on random windows of the tokens; the learning rate follows the steps, or the clock with `--minutes`."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = make_optimizer(model)
    offsets = torch.arange(SEQUENCE_LENGTH)
    model.train()
    start, step, progress, next_report = time.monotonic(), 0, 0.0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * learning_rate_factor(progress)
        starts = torch.randint(len(tokens) - SEQUENCE_LENGTH, (BATCH_SIZE, 1), generator=generator)
        batch = tokens[starts + offsets]
        # Without labels for the model: its own pooled load-balancing loss would be added to its loss.
        outputs = model(input_ids=batch, output_router_logits=True, use_cache=False)
        loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        balance = balance_loss(outputs.router_logits, model.config)
        (loss + model.config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        elapsed = time.monotonic() - start
        progress = elapsed / (60 * args.minutes) if args.minutes else step / args.steps
        if progress >= next_report:
            next_report += 0.05
            print(
                f"step {step}, {step * batch.numel() / 1e6:.2f} M tokens, {elapsed / 60:.1f} min: "
                f"loss {loss.item():.3f}, balance {balance.item():.3f}, "
                f"held-out perplexity {perplexity(model, evaluation[:16_384]):.2f}",
                flush=True,
            )


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    texts = demo_texts("train")
    tokenizer = train_tokenizer(texts)
    tokens = encode(tokenizer, texts)
    evaluation_texts = demo_texts("evaluation")
    evaluation = encode(tokenizer, evaluation_texts)
    model = build_model(tokenizer)
    print(f"{len(tokens):,} tokens of training text, {model.num_parameters():,} parameters", flush=True)
    train(model, tokens, evaluation, args)

    model.to(torch.bfloat16)
    held_out = perplexity(model, evaluation)
    bits = math.log2(held_out) * len(evaluation) / sum(len(text.encode()) for text in evaluation_texts)
    print(f"held-out perplexity in bfloat16, {len(evaluation):,} tokens: {held_out:.2f} ({bits:.3f} bits a byte)")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
