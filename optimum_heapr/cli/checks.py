# Licensed under the Apache License, Version 2.0
"""What a command refuses before any work is done for it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..configuration import HeaprConfig
from ..utils.errors import HeaprError
from ..utils.logging import say_once
from ..utils.options import Options


if TYPE_CHECKING:
    from ..calibration.statistics import AtomicStatistics


def source_names(config: Options) -> list[str]:
    """The paths and names in `config.dataset`, which may be a mixture.

    Raises:
        HeaprError: if the mixture cannot be read.
    """
    from ..text.mixtures import parse_sources

    return [source.name for source in parse_sources(config.dataset)] if config.dataset else []


def check_texts(config: HeaprConfig, calibrates: bool = True, evaluates: bool = True) -> None:
    """Opens the texts of a run, so that one that cannot be used is refused before a model is loaded for it.

    Raises:
        HeaprError: if one is missing or empty, or has no column to read.
    """
    from ..evaluation.perplexity import open_evaluation_text
    from ..text.samples import check_calibration_text

    if calibrates:
        check_calibration_text(config)
    if evaluates and config.eval_samples and config.eval_dataset is not None:
        open_evaluation_text(config.eval_dataset)


def say_unused(args: argparse.Namespace, parser: argparse.ArgumentParser, needs: dict[str, tuple[str, ...]]) -> None:
    """Says which flags were given that change nothing.

    Args:
        args (`argparse.Namespace`): the flags.
        parser (`argparse.ArgumentParser`): knows their defaults.
        needs (`dict[str, tuple[str, ...]]`): by name of a flag, those of which it takes one to have a use.
    """
    for name, others in needs.items():
        value = getattr(args, name)
        if value != parser.get_default(name) and not any(getattr(args, other) for other in others):
            say_once(f"{name}={value!r}: has no use without {' or '.join(f'--{other}' for other in others)}")


def check_serves(statistics: AtomicStatistics, config: HeaprConfig) -> None:
    """Refuses a plan whose compensation these statistics could not give when it is applied.

    Raises:
        HeaprError: saying how to get statistics that can.
    """
    if config.compensates_experts and not all(
        block.activation_gram_sum is not None for block in statistics.blocks.values()
    ):
        raise HeaprError(
            "compensate=True: these statistics hold no matrices to compensate with; calibrate with --criterion obs and without "
            "--no-grams, or pass --compensation-scope block, which reads the text again"
        )
