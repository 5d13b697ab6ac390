# Licensed under the Apache License, Version 2.0
"""Text for recovery: samples to train on, and samples of other documents to measure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..configuration import HeaprConfig
from ..text.samples import CalibrationData, load_calibration_data
from ..utils.errors import HeaprError


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from .configuration import RecoveryConfig


DATA_OPTIONS = ("dataset", "dataset_config", "split", "text_column", "packing", "seq_length", "seed")
"""Options that mean the same here as in calibration."""


@dataclass
class RecoveryData:
    """Samples of token ids; no document is in both.

    Attributes:
        training (`CalibrationData`): what is trained on.
        held_out (`CalibrationData`): what is measured only.
    """

    training: CalibrationData
    held_out: CalibrationData

    @classmethod
    def load(
        cls, config: RecoveryConfig, tokenizer: PreTrainedTokenizerBase | None, dataset: Dataset | str | None = None
    ) -> RecoveryData:
        """Divides the documents of each source, then loads both parts as for calibration.

        Args:
            config (`RecoveryConfig`): which text, how many samples, and the share that is held out.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): needed unless the data has `input_ids`.
            dataset (`Dataset` or `str`, *optional*): used in place of `config.dataset`.

        Raises:
            HeaprError: as [`~optimum_heapr.text.samples.load_calibration_data`], or if a source is a
                stream or a single document.
        """
        num_held_out = max(1, round(config.held_out * config.num_samples))
        sizes = {"train": max(1, config.num_samples - num_held_out), "test": num_held_out}

        def load(name: str) -> CalibrationData:
            def part(rows: Dataset, source: str) -> Dataset:
                if not hasattr(rows, "train_test_split"):
                    raise HeaprError(
                        f"dataset={source!r}: is a stream, and recovery holds documents out to measure; pass a "
                        "`datasets.Dataset`, such as one made from its first rows"
                    )
                if len(rows) < 2:
                    raise HeaprError(
                        f"dataset={source!r}: is one document, and recovery holds documents out to measure; cut it into "
                        "several, one a row"
                    )
                return rows.train_test_split(
                    test_size=max(1, math.floor(config.held_out * len(rows))), seed=config.seed
                )[name]

            options = {option: getattr(config, option) for option in DATA_OPTIONS}
            loading = HeaprConfig(**options, num_samples=sizes[name], eval_samples=0)
            return load_calibration_data(loading, tokenizer, dataset, part)

        return cls(load("train"), load("test"))

    def order(self, config: RecoveryConfig) -> list[int]:
        """Which training sample is seen when, one permutation after another, for all steps.

        It does not depend on the number of processes, which take turns in it.
        """
        generator = torch.Generator().manual_seed(config.seed)
        count, order = config.max_steps * config.batch_size, []
        while len(order) < count:
            order += torch.randperm(len(self.training.samples), generator=generator).tolist()
        return order[:count]
