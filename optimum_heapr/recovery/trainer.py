# Licensed under the Apache License, Version 2.0
"""transformers' `Trainer` with the loss of recovery; everything else is its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils.errors import HeaprError
from ..utils.logging import progress
from .loss import IGNORED, TeacherOutput, summed_recovery_loss, token_losses


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from .configuration import RecoveryConfig


HELD_OUT_LOSS = "held_out_loss"


class Samples(torch.utils.data.Dataset):
    """Token ids in a given order, with what the teacher said of them if that was stored.

    Args:
        samples (`list[torch.Tensor]`): token ids, 1-d int64.
        order (`list[int]`): which sample is seen when; one may come again.
        teacher (*optional*): a sequence of `TeacherOutput`, one for each of `samples`.
    """

    def __init__(self, samples: list[torch.Tensor], order: list[int], teacher: Any = None):
        self.samples, self.order, self.teacher = samples, order, teacher

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        chosen = self.order[index]
        item = {"input_ids": self.samples[chosen]}
        return item if self.teacher is None else {**item, "teacher": self.teacher[chosen]}


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads samples on the right. `labels` are shifted already: the token that comes next, `IGNORED` where none does."""
    pad = torch.nn.utils.rnn.pad_sequence
    rows = [item["input_ids"] for item in items]
    batch = {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad([torch.cat([row[1:], row.new_tensor([IGNORED])]) for row in rows], True, IGNORED),
    }
    batch["shift_labels"] = batch["labels"]  # tells the Trainer to count them as they are
    if "teacher" in items[0]:
        for name in ("indices", "log_probabilities", "log_rest"):
            batch[f"teacher_{name}"] = pad([getattr(item["teacher"], name) for item in items], batch_first=True)
    return batch


class RecoveryTrainer(Trainer):
    """Cross-entropy and divergence from a teacher, as sums over the tokens of a whole step.

    In evaluation the loss is the cross-entropy alone, in nats a token, whatever is trained on.

    Args:
        recovery (`RecoveryConfig`): weights of the loss.
        teacher (`PreTrainedModel`, *optional*): run beside the student, unless its output comes with the batches.
        options: passed to `Trainer`.
    """

    def __init__(self, recovery: RecoveryConfig, teacher: PreTrainedModel | None = None, **options: Any):
        super().__init__(data_collator=collate, compute_metrics=_held_out_loss, **options)
        self.recovery, self.teacher = recovery, teacher
        # The tokens of all micro-batches and processes of a step are counted, and the loss is divided by them here.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True

    def held_out_loss(self) -> float:
        """Cross-entropy of the model as it is now on the samples that are held out, nats a token."""
        return self.evaluate()[f"eval_{HELD_OUT_LOSS}"]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logits = model(**tokens, use_cache=False).logits
        targets = inputs["labels"].to(logits.device)
        if not model.training:
            losses = token_losses(logits, targets)
            sums = {"nll": losses.sum(1), "counted": (targets != IGNORED).sum(1)}
            loss = sums["nll"].sum() / sums["counted"].sum()
            return (loss, sums) if return_outputs else loss
        total = summed_recovery_loss(
            logits,
            targets,
            self._teacher_output(inputs, tokens, logits.device) if self.recovery.distills else None,
            self.recovery.cross_entropy_weight,
            self.recovery.distillation_weight,
            self.recovery.temperature,
        )
        if not torch.isfinite(total):
            raise HeaprError(
                f"loss={total.item()}: not finite in step {self.state.global_step + 1}; lower learning_rate="
                f"{self.recovery.learning_rate}, or load the model in bfloat16 or float32; nothing was written"
            )
        loss = total / num_items_in_batch
        # Processes average their gradients, and each has a part of the sum.
        return loss * self.accelerator.num_processes

    @torch.no_grad()
    def _teacher_output(self, inputs: dict, tokens: dict, device: torch.device) -> TeacherOutput:
        if "teacher_indices" in inputs:
            names = ("indices", "log_probabilities", "log_rest")
            return TeacherOutput(*(inputs[f"teacher_{name}"].to(device) for name in names))
        logits = self.teacher(**tokens, use_cache=False).logits.to(device)
        return TeacherOutput.of(logits, self.recovery.temperature, self.recovery.top_k_logits)


def _held_out_loss(prediction: Any) -> dict[str, float]:
    """Mean over all tokens that were held out, exact for samples of any length and any number of processes."""
    nll, counted = prediction.predictions
    return {HELD_OUT_LOSS: float(nll.astype("float64").sum() / counted.sum())}


class KeepBestAndLast(TrainerCallback):
    """Removes all checkpoints but the best and the last, by their numbers: by their times, as the `Trainer` would, a copied
    folder could lose the last."""

    def on_save(self, args, state, control, **kwargs):
        kept = {f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", Path(state.best_model_checkpoint or "").name}
        for path in Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if args.should_save and path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)


class MeasureLastStep(TrainerCallback):
    """The last step is measured and saved even if it is not a multiple of `eval_steps`."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        return control


class ProgressLines(TrainerCallback):
    """What is said of the steps where the `Trainer` shows no bar, such as in a log."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = progress(total=state.max_steps, initial=state.global_step, desc="Recovering", unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
