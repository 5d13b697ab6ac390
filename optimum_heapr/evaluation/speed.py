# Licensed under the Apache License, Version 2.0
"""How fast a model reads and writes, and the memory that it takes, measured through `generate` as users run it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..utils.errors import HeaprError
from ..utils.logging import progress
from ..utils.memory import measured_devices, peak_memory, reset_peak_memory
from .perplexity import evaluation_mode


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """
    Attributes:
        prefill (`float`): tokens of the prompt that are read in a second.
        decode (`float`): tokens that are written in a second, of all sequences together.
        prefill_spread, decode_spread (`float`): half the distance between the quartiles of the repetitions, relative to
            the median: how far to trust the figures.
        peak_bytes (`int`, *optional*): most memory of the accelerators in use meanwhile. Without one it is not measured: that
            of a process holds what models before it left behind.
        prompt_tokens, new_tokens, batch_size, repetitions (`int`): how it was measured.
        device (`str`): what on.
    """

    prefill: float
    decode: float
    prefill_spread: float
    decode_spread: float
    peak_bytes: int | None
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repetitions: int
    device: str


@torch.no_grad()
def measure_speed(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    new_tokens: int = 32,
    batch_size: int = 1,
    repetitions: int = 5,
) -> Speed:
    """Median speed of greedy generation.

    Prefill is the time to the first token; decode is what each further token takes. Give it text: random tokens take
    other ways through the experts.

    Args:
        model (`PreTrainedModel`): any model that generates.
        prompts (`Sequence[torch.Tensor]`): token ids, at least `batch_size` of them of one length; each repetition takes
            the next ones, and the first again after the last.
        new_tokens (`int`): tokens to write after the first.
        batch_size (`int`): sequences at once.
        repetitions (`int`): after one that warms up and does not count.

    Raises:
        HeaprError: if a number is less than one, or there are too few prompts or of different lengths.
    """
    for name, value in (("new_tokens", new_tokens), ("batch_size", batch_size), ("repetitions", repetitions)):
        if value < 1:
            raise HeaprError(f"{name}={value}: must be at least 1")
    if len(prompts) < batch_size or len({len(prompt) for prompt in prompts}) > 1:
        lengths = sorted({len(prompt) for prompt in prompts})
        raise HeaprError(
            f"batch_size={batch_size}: needs as many prompts of one length, and there are {len(prompts)} of {lengths} "
            "tokens; name more text or lower batch_size"
        )
    device = model.get_input_embeddings().weight.device
    batches = [torch.stack(list(prompts[i : i + batch_size])) for i in range(0, len(prompts), batch_size)]
    batches = [batch.to(device) for batch in batches if len(batch) == batch_size]

    def seconds(ids: torch.Tensor, tokens: int) -> float:
        _synchronize(device)
        began = time.perf_counter()
        greedy_tokens(model, ids, tokens)
        _synchronize(device)
        return time.perf_counter() - began

    reset_peak_memory()
    prefill, decode = [], []
    with evaluation_mode(model):
        for repetition in progress(range(repetitions + 1), desc="Timing", unit="run"):
            ids = batches[repetition % len(batches)]
            first, all_tokens = seconds(ids, 1), seconds(ids, 1 + new_tokens)
            if repetition:
                prefill.append(ids.numel() / first)
                decode.append(batch_size * new_tokens / max(all_tokens - first, 1e-9))
    return Speed(
        prefill=statistics.median(prefill),
        decode=statistics.median(decode),
        prefill_spread=_relative_spread(prefill),
        decode_spread=_relative_spread(decode),
        peak_bytes=peak_memory() if measured_devices() else None,
        prompt_tokens=batches[0].shape[1],
        new_tokens=new_tokens,
        batch_size=batch_size,
        repetitions=repetitions,
        device=device_name(device),
    )


@torch.no_grad()
def greedy_tokens(model: PreTrainedModel, ids: torch.Tensor, tokens: int, stop: bool = False) -> torch.Tensor:
    """The `tokens` most probable next tokens, one after the other, [batch, tokens].

    Args:
        model (`PreTrainedModel`): in evaluation mode.
        ids (`torch.Tensor`): prompts, [batch, length].
        tokens (`int`): how many.
        stop (`bool`): end at the end-of-text token; the result may then be shorter.
    """
    pad = model.generation_config.pad_token_id
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=None if stop else tokens,
        do_sample=False,
        num_beams=1,
        # What a model's own generation config may say of sampling is said to be without effect, with a warning.
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0 if pad is None else pad,
    )
    return made[:, ids.shape[1] :]


def device_name(device: torch.device) -> str:
    """`NVIDIA H100 …`, or `CPU, 8 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else str(device)


def _relative_spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
