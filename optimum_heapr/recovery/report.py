# Licensed under the Apache License, Version 2.0
"""What a recovery run measured: the loss after each stage, on text that the recovery was not fitted to."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..utils.companions import CARD_NAME, RECOVERY_NAME, own_folder
from ..utils.files import write_json
from ..utils.summary import Summary


@dataclass(repr=False)
class RecoveryReport(Summary):
    """
    Attributes:
        stages (`dict[str, float]`): loss in nats a token on the samples that are held out, by stage, in the order in which
            the stages were applied, as far as they were measured: `unpruned`, `pruned`, `pruned and compensated` or
            `recovered before`, and last `recovered` or `recovered by distillation`, which is this run.
        improved (`bool`): whether the last is below the one before it.
        best_step (`int`): step of the state that was kept, 0 for the start.
        steps (`int`): steps that were made.
        history (`list[dict]`): `step` and `loss` of each measurement on the way, of the whole update.
        trained_parameters (`int`): parameters of the adapter.
        seconds (`float`): of the training, measurements included.
        data (`dict`): fingerprints of the samples, `training` and `held_out`.
        config (`dict`): the `RecoveryConfig`.
        model (`dict`): what tells the pruned model from others.
        teacher (`str`, *optional*): name of the teacher.
    """

    stages: dict[str, float]
    improved: bool
    best_step: int
    steps: int
    history: list[dict[str, Any]]
    trained_parameters: int
    seconds: float
    data: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Any]
    teacher: str | None = None

    def _summary(self) -> dict[str, str]:
        kept = f"step {self.best_step} of {self.steps}" if self.improved else "nothing: it did not improve"
        return {**{stage: f"{loss} ({change})" for stage, loss, change in self.rows()}, "kept": kept}

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `recovery_report.json` into `folder` and returns its path."""
        path = Path(folder) / RECOVERY_NAME
        write_json(path, asdict(self))
        return path

    def add_to(self, folder: str | os.PathLike) -> None:
        """Saves the report into the folder of a checkpoint, and adds it to the card there, if there is one."""
        self.save(own_folder(folder))
        card = Path(folder) / CARD_NAME
        if card.is_file():
            card.write_text(f"{card.read_text(encoding='utf-8')}\n{self.card_section()}", encoding="utf-8")

    def rows(self) -> list[list[Any]]:
        """Stage, loss, and its difference to the unpruned model (where that was measured) or else to the first stage."""
        first = next(iter(self.stages.values()))
        return [[stage, f"{loss:.4f}", f"{loss - first:+.4f}"] for stage, loss in self.stages.items()]

    def card_section(self) -> str:
        """The part of a model card about the recovery."""
        import yaml

        table = ["| stage | held-out loss | difference |", "|---|---:|---:|"]
        table += [f"| {' | '.join(row)} |" for row in self.rows()]
        share = self.config["weight_interpolation"]
        kept = "the state" if share == 1 or not self.improved else f"{share:g} of the update"
        options = {name: value for name, value in self.config.items() if value is not None}
        return (
            f"## Recovery\n\n{self.trained_parameters:,} parameters were trained for {self.steps} steps; kept is {kept} "
            f"after step {self.best_step}. Losses in nats a token, on {self.data['held_out']['num_tokens']:,} tokens of "
            "documents that were not trained on, of the same source:\n\n"
            + "\n".join(table)
            + f"\n\n```yaml\n{yaml.safe_dump(options, sort_keys=False, allow_unicode=True)}```\n"
        )
