# Licensed under the Apache License, Version 2.0
"""One recovery run: measure, train, measure again, and keep the result only if it is better."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.checks import warn_about_products
from ..experts import experts_of_any_width
from ..utils.errors import HeaprError
from ..utils.logging import get_logger, is_main_process
from ..utils.placement import has_accelerator, place
from ..utils.public import public_name
from .adapter import (
    as_it_was_after_errors,
    check_pruned,
    identity_of,
    interpolate,
    known_warnings_of_peft,
    without_adapter,
)
from .data import RecoveryData
from .report import RecoveryReport
from .reporting import reporting_callbacks
from .targets import adapter_config
from .teacher import held_out_loss


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainingArguments

    from ..planning.plan import PruningPlan
    from .configuration import RecoveryConfig
    from .state import RunFolder
    from .teacher import Teacher


logger = get_logger(__name__)

WARMUP = 0.05
"""Share of the steps over which the learning rate rises."""

RECOVERED = "heapr_recovered"
"""Entry of the configuration of merged models."""

LEAST_IMPROVEMENT = 1e-4
"""Nats a token; what is less may be rounding."""


@dataclass
class Recovery:
    """What a run gave.

    Attributes:
        model (`PeftModel` or `PreTrainedModel`): the pruned model with the adapter of its best state; as it was, without one,
            if no state was better.
        report (`RecoveryReport`): every loss that was measured.
        dtypes (`dict[str, torch.dtype]`): of the weights of the pruned model; what is trained is in float32.
    """

    model: PeftModel | PreTrainedModel
    report: RecoveryReport
    dtypes: dict[str, torch.dtype]

    def merge(self) -> PreTrainedModel:
        """Adds the adapter, if there is one, to the weights, in place, and returns the plain model."""
        if not self.report.improved:
            return self.model
        merged = self.model.merge_and_unload()
        for name, parameter in merged.named_parameters():  # of norms and routers the trained copies take the place
            parameter.data = parameter.data.to(self.dtypes[name])
        setattr(merged.config, RECOVERED, True)
        return merged


def recover(
    model: PreTrainedModel,
    config: RecoveryConfig,
    data: RecoveryData,
    folder: RunFolder,
    teacher: Teacher | None = None,
    plan: PruningPlan | None = None,
    saved_at: str | None = None,
) -> Recovery:
    """Trains an adapter on a pruned model.

    Args:
        model (`PreTrainedModel`): pruned; its layers are wrapped by PEFT in place; [`Recovery.merge`] ends that.
        config (`RecoveryConfig`): what, how and how long.
        data (`RecoveryData`): samples.
        folder (`RunFolder`): for checkpoints; one that is there already is gone on from.
        teacher (`Teacher`, *optional*): the unpruned model or its output, and what was measured of it.
        plan (`PruningPlan`, *optional*): as for
            [`~optimum_heapr.recovery.teacher.Teacher.prepare`]; used when the teacher is not needed any more.
        saved_at (`str`, *optional*): folder or name of the pruned model, for the adapter to say.

    Raises:
        HeaprError: if the model was not pruned, has nothing of what is to be trained, a loss is not finite, the teacher is
            missing, or the folder is of another run. After this or any other error the model is as it was.
    """
    check_pruned(model)
    if config.distills and teacher is None:
        raise HeaprError(
            f"teacher=None: distillation_weight={config.distillation_weight} needs the unpruned model; name it, or set "
            "distillation_weight to 0"
        )
    identity, dtypes = identity_of(model), {name: parameter.dtype for name, parameter in model.named_parameters()}
    trained = config.replace(report_to=None)  # a run may go on and report elsewhere
    folder.begin({"model": identity, "config": trained.to_dict(), "data": _fingerprints(data)})

    running = [model] if teacher is None or teacher.model is None else [model, teacher.model]
    with ExitStack() as stack:
        for each in running:
            stack.enter_context(experts_of_any_width(each))
        wrapped = stack.enter_context(as_it_was_after_errors(model))
        warn_about_products(place(model).dtype, model.device)
        start, stage = held_out_loss(model, data), _stage_of(model)
        peft_model = _with_adapter(model, config, saved_at)
        wrapped.append(peft_model)
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):  # the Trainer seeds the generators of this process
            trainer = _trainer(peft_model, config, data, folder, teacher)
            trainer.train(resume_from_checkpoint=folder.last_checkpoint)
        seconds = time.perf_counter() - began
        history = _history(trainer)
        best = min(history, key=lambda measured: measured["loss"])
        recovered = best["loss"]
        if config.weight_interpolation < 1:
            interpolate(peft_model, config.weight_interpolation)
            recovered = trainer.held_out_loss()

    improved = recovered < start - LEAST_IMPROVEMENT
    if teacher is not None and teacher.model is not None:
        teacher.measure_pruned(teacher.model, plan, data)
    before = {name: teacher.stages[name] for name in ("unpruned", "pruned") if teacher and name in teacher.stages}
    after = "recovered by distillation" if config.distills else "recovered"
    report = RecoveryReport(
        stages={**before, stage: start, after: recovered},
        improved=improved,
        best_step=best["step"] if improved else 0,
        steps=trainer.state.global_step,
        history=history,
        trained_parameters=sum(p.numel() for p in peft_model.parameters() if p.requires_grad),
        seconds=seconds,
        data=_fingerprints(data),
        config=config.public().to_dict(),
        model=identity,
        teacher=public_name(teacher.name) if teacher else None,
    )
    return Recovery(peft_model.eval() if improved else without_adapter(peft_model), report, dtypes)


def _stage_of(model: PreTrainedModel) -> str:
    """What the report calls the model that is trained."""
    if getattr(model.config, RECOVERED, False):
        return "recovered before"
    return "pruned and compensated" if model.config.heapr_config.get("compensate") else "pruned"


def _fingerprints(data: RecoveryData) -> dict[str, Any]:
    return {"training": data.training.fingerprint, "held_out": data.held_out.fingerprint}


def _with_adapter(model: PreTrainedModel, config: RecoveryConfig, saved_at: str | None) -> PeftModel:
    """Wraps the model; what is trained is in float32, or small steps would be lost to rounding."""
    from peft import get_peft_model

    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        with known_warnings_of_peft():
            peft_model = get_peft_model(model, adapter_config(model, config))
    # Of a model that was pruned in memory PEFT would name the unpruned one, now, and with `None` when it saves.
    peft_model.active_peft_config.base_model_name_or_path = saved_at or ""
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


def _trainer(
    model: PeftModel,
    config: RecoveryConfig,
    data: RecoveryData,
    folder: RunFolder,
    teacher: Teacher | None,
):
    from transformers import EarlyStoppingCallback, PrinterCallback

    from .trainer import KeepBestAndLast, MeasureLastStep, ProgressLines, RecoveryTrainer, Samples

    arguments = _arguments(config, folder, model.dtype == torch.bfloat16)
    beside, cache = (teacher.model, teacher.cache) if teacher else (None, None)
    if beside is not None:
        beside.requires_grad_(False).eval()
    trainer = RecoveryTrainer(
        recovery=config,
        teacher=beside,
        model=model,
        args=arguments,
        train_dataset=Samples(data.training.samples, data.order(config), cache),
        eval_dataset=Samples(data.held_out.samples, list(range(len(data.held_out.samples)))),
        callbacks=[EarlyStoppingCallback(config.patience), MeasureLastStep(), KeepBestAndLast()]
        + ([ProgressLines()] if arguments.disable_tqdm else [])
        + reporting_callbacks(config),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(config: RecoveryConfig, folder: RunFolder, is_bfloat16: bool) -> TrainingArguments:
    """The choices of a run that are the `Trainer`'s.

    Samples come in an order drawn beforehand, in one epoch, so that neither a restart nor the number of processes changes
    which of them are in a step.
    """
    from transformers import TrainingArguments

    from .trainer import HELD_OUT_LOSS

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    together = config.micro_batch_size * processes
    if config.batch_size % together:
        raise HeaprError(
            f"batch_size={config.batch_size}: {processes} processes with micro_batch_size={config.micro_batch_size} make "
            f"steps of multiples of {together}; use one of these"
        )
    every = {"eval_steps": config.eval_steps, "save_steps": config.eval_steps, "logging_steps": config.eval_steps}
    reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        str(folder.path),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // together,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(WARMUP * config.max_steps)),
        weight_decay=0.0,
        bf16=config.bf16 or is_bfloat16,
        **({"gradient_checkpointing": True, **reentrant} if config.gradient_checkpointing else {}),
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        save_strategy="steps",
        logging_strategy="steps",
        **every,
        load_best_model_at_end=True,
        metric_for_best_model=HELD_OUT_LOSS,
        greater_is_better=False,
        label_names=["labels"],
        remove_unused_columns=False,
        use_cpu=not has_accelerator(),
        dataloader_pin_memory=has_accelerator(),
        disable_tqdm=_no_bars(),
        report_to="none",  # by `reporting_callbacks`
        seed=config.seed,
    )
    # Of several GPUs that one process sees, the Trainer would take all: nn.DataParallel, which copies the model for every
    # micro-batch, and as many times the samples in a step. A launcher is what spreads a run; its processes have one each.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _no_bars() -> bool:
    import sys

    return bool(os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")) or not is_main_process() or not sys.stderr.isatty()


def _history(trainer) -> list[dict[str, Any]]:
    """The measurements on the way."""
    from .trainer import HELD_OUT_LOSS

    name = f"eval_{HELD_OUT_LOSS}"
    return [{"step": entry["step"], "loss": entry[name]} for entry in trainer.state.log_history if name in entry]
