# Licensed under the Apache License, Version 2.0
"""What can be seen of a model before and after it is cut: its size and, on some text, loss, speed and completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..evaluation.perplexity import evaluation_mode, evaluation_windows, window_losses
from ..evaluation.size import ModelSize
from ..evaluation.speed import Speed, greedy_tokens, measure_speed
from ..utils.errors import HeaprError
from ..utils.logging import get_logger
from ..utils.positions import positions_of


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..configuration import HeaprConfig
    from ..text.samples import CalibrationData


logger = get_logger(__name__)

PROMPTS = 3
PROMPT_TOKENS, COMPLETION_TOKENS = 48, 32
TIMED_TOKENS = 512  # of a prompt
TIMED_NEW_TOKENS, REPETITIONS = 16, 3


@dataclass(frozen=True)
class Workload:
    """The text that a model is measured on before and after.

    Attributes:
        source (`str`): where it comes from.
        held_out (`bool`): whether it is known to be what calibration left over of its text.
        windows (`list[torch.Tensor]`): token ids, each window predicted from its own beginning.
        prompts (`list[torch.Tensor]`): token ids to go on from.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): without it nothing is completed.
    """

    source: str
    held_out: bool
    windows: list[torch.Tensor]
    prompts: list[torch.Tensor]
    tokenizer: PreTrainedTokenizerBase | None

    @classmethod
    def of(
        cls,
        config: HeaprConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        data: CalibrationData | None,
        prompts: list[str] | None = None,
        calibrated_on: str | None = None,
    ) -> Workload | None:
        """What a config asks to measure on: `eval_dataset`, or else what calibration held out; `None` if there is nothing.

        Args:
            config (`HeaprConfig`): its evaluation part is used.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): of the model.
            data (`CalibrationData`, *optional*): what calibration ran on, with what it left over.
            prompts (`list[str]`, *optional*): texts to complete, in place of beginnings of windows; rendered by the chat
                template, if there is one.
            calibrated_on (`str`, *optional*): hash of what the statistics were measured on, if that may be other text than `data`.

        Raises:
            HeaprError: if the data is missing or too short.
        """
        if config.eval_samples == 0:
            return None
        if config.eval_dataset is not None:
            source = config.eval_dataset
            windows = evaluation_windows(tokenizer, source, config.seq_length, config.eval_samples)
        elif data is not None and data.held_out:
            source, windows = data.source, data.held_out[: config.eval_samples]
        else:
            return None
        if prompts is None:
            spread = windows[:: max(len(windows) // PROMPTS, 1)][:PROMPTS]
            given = [_beginning(window, tokenizer) for window in spread] if tokenizer is not None else []
        else:
            given = prompt_ids(prompts, tokenizer)
        is_held_out = config.eval_dataset is None
        if is_held_out and calibrated_on not in (None, data.fingerprint["sha256"]):
            logger.warning("%s: the statistics are of other text, and may be of some that is measured on", source)
            is_held_out = False
        return cls(source, is_held_out, windows, given, tokenizer)


@dataclass
class Observation:
    """
    Attributes:
        size (`ModelSize`): parameters and bytes.
        losses (`list[float]`, *optional*): summed loss of each window, nats.
        speed (`Speed`, *optional*): of reading and writing.
        completions (`list[str]`): of the prompts.
        problems (`list[str]`): why something is missing.
        left_out (`str`, *optional*): what the checkpoint has that the model has not.
    """

    size: ModelSize
    losses: list[float] | None = None
    speed: Speed | None = None
    completions: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: str | None = None


def observe(model: PreTrainedModel, tokens: dict[str, list[int]], workload: Workload | None = None) -> Observation:
    """Looks at a model, before or after it was cut. What cannot be measured is said to be, and stops nothing.

    Args:
        model (`PreTrainedModel`): with storage, if there is a workload.
        tokens (`dict[str, list[int]]`): calibration tokens that each of its experts got, by block path.
        workload (`Workload`, *optional*): what to measure on; without it only sizes are taken.
    """
    seen = Observation(ModelSize.of(model, tokens), left_out=getattr(model, "left_out", None))
    if workload is None:
        return seen
    for name, look in (("loss", _see_loss), ("speed", _see_speed), ("completions", _see_completions)):
        try:
            look(seen, model, workload)
        except Exception as error:  # hours of calibration are not thrown away for a figure of the report
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            seen.problems.append(f"{name}: {reason}")
            logger.warning("the report is without %s (%s)", name, reason)
    return seen


def _see_loss(seen: Observation, model: PreTrainedModel, workload: Workload) -> None:
    seen.losses = window_losses(model, workload.windows, workload.source)


def _see_speed(seen: Observation, model: PreTrainedModel, workload: Workload) -> None:
    room = positions_of(model) or TIMED_TOKENS
    length = min(TIMED_TOKENS, max(map(len, workload.windows)), max(room - TIMED_NEW_TOKENS - 1, 1))
    prompts = [window[:length] for window in workload.windows if len(window) >= length]
    seen.speed = measure_speed(model, prompts, TIMED_NEW_TOKENS, repetitions=REPETITIONS)


def _see_completions(seen: Observation, model: PreTrainedModel, workload: Workload) -> None:
    device = model.get_input_embeddings().weight.device
    with evaluation_mode(model):
        for prompt in workload.prompts:
            made = greedy_tokens(model, prompt.to(device).unsqueeze(0), COMPLETION_TOKENS, stop=True)[0]
            seen.completions.append(workload.tokenizer.decode(made, skip_special_tokens=True))


def _beginning(window: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """What to go on from: the beginning of a text that begins in the window, or else of a line, or what the window begins with.

    A window may begin inside a word, and joins texts: no prompt goes on from one into the next.
    """
    special, ids = set(tokenizer.all_special_ids), window.tolist()
    length = min(PROMPT_TOKENS, len(ids) // 2)
    texts = [at + 1 for at, token in enumerate(ids[: len(ids) - length]) if token in special]
    lines = [at + 1 for at, token in enumerate(ids[: len(ids) // 3]) if "\n" in tokenizer.decode([token])]
    longest = torch.empty(0, dtype=window.dtype)
    for first in [*texts, *lines, 0]:
        end = next((at for at, token in enumerate(ids[first:], first) if token in special), len(ids))
        piece = window[first : min(end, first + length)]
        if len(piece) == length:
            return piece
        longest = max(longest, piece, key=len)
    return longest


def needs_text(config: HeaprConfig, measures: bool) -> bool:
    """Whether applying a plan reads `config.dataset`: to compensate blocks or, if it `measures`, for what calibration left over."""
    leaves_over = config.dataset is not None and config.eval_dataset is None and config.eval_samples > 0
    return config.compensates_blocks or (measures and leaves_over)


def check_prompts(
    prompts: Sequence[str] | None, tokenizer: PreTrainedTokenizerBase | None, measured: bool = True
) -> None:
    """Refuses, before anything is spent, prompts that cannot be completed.

    Raises:
        HeaprError: as [`prompt_ids`], or if nothing is to be measured.
    """
    if prompts is not None:
        prompt_ids(prompts, tokenizer)
        if not measured:
            raise HeaprError(
                "prompts: are completed where the model is measured; pass measure=True, or leave them out"
            )


def prompt_ids(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> list[torch.Tensor]:
    """Token ids of texts to go on from.

    Raises:
        HeaprError: if they are no list of texts, there is no tokenizer, or one of them is empty.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise HeaprError(
            f"prompts={prompts!r}: is of type {type(prompts).__name__}; pass a list of texts, such as ['Once upon']"
        )
    if not prompts:
        raise HeaprError(f"prompts={prompts!r}: has none; leave it out for beginnings of the text that is measured on")
    if tokenizer is None:
        raise HeaprError("prompts: the model has no tokenizer to read them with; leave them out")
    return [_prompt_ids(text, tokenizer) for text in prompts]


def _prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    if not isinstance(text, str):
        raise HeaprError(f"prompts: {text!r} is of type {type(text).__name__}; each is a text")
    if not text.strip():  # a chat template would make tokens of it
        raise HeaprError(f"prompts: {text!r} has no tokens; write something to go on from")
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(text)["input_ids"]
    if not ids:
        raise HeaprError(f"prompts: {text!r} has no tokens; write something to go on from")
    return torch.tensor(ids)
