# Licensed under the Apache License, Version 2.0
"""What many tests need: tiny models of several families, tokens, a tokenizer, statistics made of random numbers.

Everything is built in code, so that the tests need no download and no file outside this folder.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from optimum_heapr.calibration.statistics import AtomicStatistics
    from optimum_heapr.text.samples import CalibrationData


VOCAB_SIZE = 320

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "An expert is a sum of atomic experts: three rows of weights, one number each.",
    "A router sends every token to a few experts; some experts wait for years.",
    "def prune(model, ratio):\n    return [row for row in model if row.score > ratio]",
    "Numbers such as 0, 1, 2, 3, 42 and 1024 occur in text as well.",
    "Whoever measures twice cuts once, and whoever cuts twice has measured badly.",
)

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Large enough that activations bend and experts differ; the usual 0.02 makes a tiny network almost linear.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 2},
    "mixtral": {"intermediate_size": 12, "num_local_experts": 6, "num_experts_per_tok": 2},
    # Weights transposed, gate and up interleaved, biases, a gate function of its own.
    "gpt_oss": {
        "intermediate_size": 12,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    # A dense first layer, shared experts.
    "deepseek_v2": {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 12,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "num_key_value_heads": 4,
        "kv_lora_rank": 12,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    # This package's own port, with a dense first layer and shared experts.
    "deepseek": {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 12,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
    },
    "llama": {},  # dense: for what has to be refused
}


def tiny_model(
    model_type: str = "qwen3_moe", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A model with a language-model head and random weights, in evaluation mode: 2 routed layers of 6 experts.

    Args:
        model_type (`str`): `qwen2_moe`, `qwen3_moe`, `mixtral`, `gpt_oss`, `deepseek`, `deepseek_v2`, or the dense `llama`.
        seed (`int`): of the weights; equal seeds give equal weights.
        dtype (`torch.dtype`): of the weights. float64 comes with the experts implementation `eager`, as the grouped
            kernel of torch has no float64.
        changes: options of the model's config that differ.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {**_COMMON, **_FAMILIES[model_type], **changes}
    if model_type == "deepseek_v2":
        options.pop("head_dim")
    config = AutoConfig.for_model(model_type, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "bias" in name or "norm" in name:  # zeros and ones would hide whether they are used
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(dtype)
    if dtype == torch.float64 and model_type != "llama":
        model.set_experts_implementation("eager")
    return model


def take_figures_briefly() -> None:
    """Every pruning writes a report: no test needs the median of three speeds, nor long completions. Nor all of the demonstration's text."""
    from optimum_heapr.cli import demo
    from optimum_heapr.report import observation

    demo.SAMPLES = demo.EVALUATED = 8

    observation.REPETITIONS = 1
    observation.TIMED_NEW_TOKENS = 1
    observation.COMPLETION_TOKENS = 2


def random_ids(samples: int = 2, length: int = 16, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> torch.Tensor:
    """Token ids [samples, length]."""
    return torch.randint(0, vocab_size, (samples, length), generator=torch.Generator().manual_seed(seed))


def random_samples(*lengths: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> list[torch.Tensor]:
    """Token ids of samples of different lengths."""
    return [random_ids(1, length, vocab_size, seed + index)[0] for index, length in enumerate(lengths)]


def calibration_data(*lengths: int, seed: int = 0) -> CalibrationData:
    """Random calibration samples of these lengths."""
    from optimum_heapr.text.samples import CalibrationData

    return CalibrationData(random_samples(*lengths, seed=seed), "random tokens", seed, max(lengths))


SUMS = ("activation_sq_sum", "gradient_sq_sum", "fisher_sum")


def assert_same_statistics(actual: AtomicStatistics, expected: AtomicStatistics, rtol: float = 1e-9) -> None:
    """Compares the measured sums and counts of two calibrations, relatively, atom by atom."""
    assert list(actual.blocks) == list(expected.blocks)
    for path, block in expected.blocks.items():
        assert torch.equal(actual.blocks[path].token_count, block.token_count), path
        for name in SUMS:
            torch.testing.assert_close(
                getattr(actual.blocks[path], name),
                getattr(block, name),
                rtol=rtol,
                atol=0,
                msg=lambda m: f"{path} {m}",
            )


def random_statistics(
    blocks: int = 2,
    experts: int = 4,
    width: int = 8,
    seed: int = 0,
    unreached: dict[int, list[int]] | None = None,
    dtype: torch.dtype = torch.float32,
    sources: int = 0,
) -> AtomicStatistics:
    """Statistics made of random numbers: what planning sees, without a model.

    Args:
        blocks, experts, width (`int`): how many blocks, experts in each, atomic experts in each of those.
        seed (`int`): of the numbers.
        unreached (`dict[int, list[int]]`, *optional*): by index of the block, experts that no token reached.
        dtype (`torch.dtype`): of the sums.
        sources (`int`): how many the text has, `text 0` and so on of 100 tokens each, with sums of their own that differ a lot;
            by default nothing is said of it.
    """
    from optimum_heapr.calibration.statistics import SUMMED_BY_SOURCE, AtomicStatistics, BlockStatistics

    generator = torch.Generator().manual_seed(seed)
    texts = [{"name": f"text {index}", "num_samples": 4, "num_tokens": 100} for index in range(sources)]
    made = {}
    for index in range(blocks):
        activation, gradient, fisher, norm = 0.1 + torch.rand(4, experts, width, generator=generator, dtype=dtype)
        count = torch.randint(1, 50, (experts,), generator=generator)
        outputs = torch.rand(experts, generator=generator, dtype=dtype)
        for expert in (unreached or {}).get(index, []):
            for measured in (activation, gradient, fisher, count, outputs):
                measured[expert] = 0
        made[f"model.layers.{index}.mlp.experts"] = BlockStatistics(activation, gradient, fisher, norm, count, outputs)
    for block in made.values() if sources > 1 else ():
        for name in SUMMED_BY_SOURCE:
            total = getattr(block, name)
            if name == "token_count":
                parts = torch.randint(1, 50, (len(total), sources), generator=generator) * block.reached.unsqueeze(1)
                block.token_count = parts.sum(1)
            else:
                share = torch.rand(len(total), sources, *total.shape[1:], generator=generator) ** 4
                parts = (total.unsqueeze(1) * share / share.sum(1, keepdim=True)).to(total.dtype)
            setattr(block, f"source_{name}", parts)
    fingerprint = {
        "model": {
            "model_type": "qwen3_moe",
            "experts_per_token": 2,
            "num_parameters": 10_000,
            "parameters_per_atomic_expert": 96,
            "weights": "0123456789abcdef",
        },
        "storage": {"num_bytes": 20_000, "bytes_per_atomic_expert": 192},
        "data": {
            "source": "random numbers",
            "sha256": "fedcba9876543210",
            "num_samples": 4 * max(sources, 1),
            "num_tokens": 100 * max(sources, 1),
            **({"sources": texts} if sources else {}),
        },
        "seed": 0,
        "seq_length": 25,
        "loss": 5.0,
    }
    return AtomicStatistics(made, fingerprint)


def tiny_tokenizer(folder: str | Path | None = None, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of less than `VOCAB_SIZE` tokens, trained on a few sentences; `<|end|>` (id 0) ends a text.

    Args:
        folder (`str`, *optional*): saved there, beside a model for instance.
        chat_template (`str`, *optional*): by default it has none.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        eos_token="<|end|>",
        bos_token="<|end|>",
        model_max_length=128,
        chat_template=chat_template,
    )
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@functools.cache
def _trained_tokenizer() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 10,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parents[1]


def shared_folder() -> Path:
    """The folder `shared` beside the repository: a trained model, texts and reference results, not part of it.

    Skips the test that calls it where there is none.
    """
    folder = repository().parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder ../shared beside the repository: this test needs the trained model in it")
    return folder


needs_shared = pytest.mark.skipif(
    not (repository().parent / "shared").is_dir(),
    reason="no folder ../shared beside the repository: this test needs the trained model in it",
)


def plain_qwen3_moe(width: int = 8, seed: int = 0) -> PreTrainedModel:
    """A Qwen3-MoE just as transformers initialises it, in evaluation mode: 2 layers of 4 experts, 40 tokens.

    Args:
        width (`int`): atomic experts of one expert.
        seed (`int`): of the weights.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    return Qwen3MoeForCausalLM(config).eval()
