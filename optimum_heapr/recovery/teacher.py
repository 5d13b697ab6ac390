# Licensed under the Apache License, Version 2.0
"""The teacher: the unpruned model, run beside the student, or what it says written to the disk once."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.loading import load_model
from ..experts import experts_of_any_width, model_name
from ..surgery.apply import apply_plan
from ..utils.errors import HeaprError
from ..utils.files import replace_file, write_json
from ..utils.logging import get_logger, progress
from ..utils.placement import place
from .data import RecoveryData
from .loss import TeacherOutput
from .state import wait_for_all


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..planning.plan import PruningPlan
    from .configuration import RecoveryConfig
    from .state import RunFolder


logger = get_logger(__name__)


@dataclass
class Teacher:
    """
    Attributes:
        name (`str`): what the user calls it.
        stages (`dict[str, float]`): loss on the samples that are held out, of the teacher (`unpruned`), and of what the
            plan leaves of it without compensation (`pruned`), as far as they were measured.
        model (`PreTrainedModel`, *optional*): to be run beside the student.
        cache (`TeacherCache`, *optional*): its output for the training samples.
    """

    name: str
    stages: dict[str, float] = field(default_factory=dict)
    model: PreTrainedModel | None = None
    cache: TeacherCache | None = None

    @classmethod
    def prepare(
        cls,
        teacher: PreTrainedModel | str | os.PathLike,
        student: PreTrainedModel,
        config: RecoveryConfig,
        data: RecoveryData,
        folder: RunFolder,
        plan: PruningPlan | None = None,
        **model_options: Any,
    ) -> Teacher:
        """Loads the teacher, measures it, and writes its output down if that was asked for; then it is let go.

        Args:
            teacher (`PreTrainedModel` or `str`): a model that the caller can spare, for it may be cut, or what to load.
            student (`PreTrainedModel`): the pruned model; only its configuration is looked at.
            config (`RecoveryConfig`): whether and how it teaches.
            data (`RecoveryData`): samples.
            folder (`RunFolder`): where the output goes.
            plan (`PruningPlan`, *optional*): what the student was pruned by; with it, the share of compensation is measured.
            model_options: as for [`~optimum_heapr.checkpoints.loading.load_model`].

        Raises:
            HeaprError: if it cannot be loaded, has another vocabulary or hidden size, or the folder is of another teacher.
        """
        is_name = isinstance(teacher, (str, os.PathLike))
        made = cls(str(teacher) if is_name else model_name(teacher))
        plan = plan if plan is not None and plan.config.compensate else None
        if config.distills and config.cache_teacher:
            made.cache = TeacherCache(folder.path / "teacher", config, data, made.name)
            if made.cache.is_complete:
                made.stages = made.cache.stages
                return made
        model = load_model(teacher, **model_options)[0] if is_name else teacher
        check_teacher(model, student, made.name)
        place(model)
        made.stages["unpruned"] = held_out_loss(model, data)
        if config.distills and not config.cache_teacher:
            made.model = model
            return made
        if made.cache is not None:
            made.cache.fill(model)
        made.measure_pruned(model, plan, data)
        if made.cache is not None:
            wait_for_all()  # each has written its part
            made.cache.complete(made.stages)
        return made

    def measure_pruned(self, model: PreTrainedModel, plan: PruningPlan | None, data: RecoveryData) -> None:
        """What compensation began from: cuts the teacher, which is not needed any more, without compensation."""
        if plan is None:
            return
        config = plan.config.replace(compensate=False, compensation_scope="expert", reconstruction_steps=0)
        plain = type(plan)(**{**vars(plan), "config": config})
        try:
            self.stages["pruned"] = held_out_loss(apply_plan(model, plain), data)
        except HeaprError as error:  # a teacher of the same shape need not be the model that was pruned
            logger.warning("the loss without compensation was not measured: %s", error)


def check_teacher(teacher: PreTrainedModel, student: PreTrainedModel, name: str) -> None:
    """Refuses a model that the student cannot have been pruned from.

    Raises:
        HeaprError: naming what differs.
    """
    for option, what in (("vocab_size", "vocabulary"), ("hidden_size", "hidden size")):
        ours, theirs = (getattr(model.config.get_text_config(), option) for model in (student, teacher))
        if ours != theirs:
            raise HeaprError(
                f"teacher={name!r}: has a {what} of {theirs}, the pruned model one of {ours}; name the model that it was "
                "pruned from"
            )


def held_out_loss(model: PreTrainedModel, data: RecoveryData) -> float:
    """Cross-entropy on the samples that are held out, nats a token.

    Raises:
        HeaprError: if it is not finite.
    """
    import datasets

    from ..evaluation.perplexity import evaluate_perplexity

    rows = datasets.Dataset.from_dict({"input_ids": [sample.tolist() for sample in data.held_out.samples]})
    return evaluate_perplexity(model, None, rows, max(map(len, data.held_out.samples)))["loss"]


class TeacherCache:
    """The output of the teacher for each training sample, one safetensors file a sample.

    Args:
        folder (`Path`): where the files are.
        config (`RecoveryConfig`): temperature and number of tokens kept.
        data (`RecoveryData`): samples.
        teacher (`str`): name of the teacher.

    Raises:
        HeaprError: if the folder holds the output for other samples, or of another teacher.
    """

    def __init__(self, folder: Path, config: RecoveryConfig, data: RecoveryData, teacher: str):
        self.folder, self.config, self.samples = folder, config, data.training.samples
        self.made_of = made_of = {
            "teacher": teacher,
            "temperature": config.temperature,
            "top_k_logits": config.top_k_logits,
            "training samples": data.training.fingerprint["sha256"],
            "held-out samples": data.held_out.fingerprint["sha256"],
        }
        about = folder / "teacher.json"
        found = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else made_of
        for name, value in made_of.items():
            if found.get(name) != value:
                raise HeaprError(
                    f"{name}={value!r}: {str(folder)!r} was written with {found.get(name)!r}; remove it to begin anew"
                )

    def path(self, index: int) -> Path:
        """The file of a sample."""
        return self.folder / f"{index:06d}.safetensors"

    @property
    def is_complete(self) -> bool:
        """Whether the teacher is not needed any more."""
        return (self.folder / "stages.json").is_file()

    @property
    def stages(self) -> dict[str, float]:
        """What was measured with the teacher."""
        return json.loads((self.folder / "stages.json").read_text(encoding="utf-8"))

    def complete(self, stages: dict[str, float]) -> None:
        """Records what was measured with the teacher, which is then not loaded again."""
        write_json(self.folder / "stages.json", stages)

    @torch.no_grad()
    def fill(self, teacher: PreTrainedModel) -> None:
        """Runs the teacher on the samples that have no file yet; under a launcher, processes take turns."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "teacher.json", self.made_of)
        device = teacher.get_input_embeddings().weight.device
        rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        own = [index for index in range(rank, len(self.samples), processes) if not self.path(index).is_file()]
        with experts_of_any_width(teacher):
            for index in progress(own, desc="Teacher", unit="sample"):
                logits = teacher(input_ids=self.samples[index].to(device).unsqueeze(0), use_cache=False).logits[0]
                output = TeacherOutput.of(logits, self.config.temperature, self.config.top_k_logits)
                tensors = {**vars(output), "indices": output.indices.int()}
                with replace_file(self.path(index)) as temporary:
                    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)

    def __getitem__(self, index: int) -> TeacherOutput:
        from safetensors.torch import load_file

        tensors = load_file(self.path(index))
        return TeacherOutput(tensors["indices"].long(), tensors["log_probabilities"], tensors["log_rest"])
