# Licensed under the Apache License, Version 2.0
"""A recovery run of a model that is in memory, from the text to the merged model."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ..utils.errors import HeaprError
from .adapter import check_pruned
from .configuration import RecoveryConfig
from .data import RecoveryData
from .output import save_adapter
from .reporting import check_reporting
from .runner import recover
from .state import RunFolder
from .teacher import Teacher


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..planning.plan import PruningPlan
    from .report import RecoveryReport


def recover_in_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Dataset | str | None = None,
    config: RecoveryConfig | None = None,
    teacher: PreTrainedModel | str | os.PathLike | None = None,
    plan: PruningPlan | None = None,
    state_path: str | os.PathLike | None = None,
    resume: bool = False,
    adapter_folder: str | os.PathLike | None = None,
) -> tuple[PreTrainedModel, RecoveryReport]:
    """Prepares the teacher, trains, writes the adapter if that was asked for, and merges.

    Args:
        model (`PreTrainedModel`): pruned; changed in place.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed unless the data has `input_ids`.
        dataset, config, teacher, state_path, resume, adapter_folder: as for [`~optimum_heapr.HeaprPruner.recover`].
        plan (`PruningPlan`, *optional*): what the model was pruned by.

    Raises:
        HeaprError: if `resume` is on without a `state_path`, or as [`~optimum_heapr.recovery.runner.recover`].
    """
    check_pruned(model)
    if resume and state_path is None:
        raise HeaprError("state_path=None: resume=True needs a folder; name one")
    config = RecoveryConfig.checked(config)
    check_reporting(config)
    data = RecoveryData.load(config, tokenizer, dataset)
    with ExitStack() as stack:
        # A temporary folder is there already, and empty.
        path = state_path or stack.enter_context(tempfile.TemporaryDirectory())
        folder = stack.enter_context(RunFolder(path, resume or state_path is None))
        taught = None if teacher is None else Teacher.prepare(teacher, model, config, data, folder, plan)
        recovery = recover(model, config, data, folder, taught, plan)
        if adapter_folder is not None and recovery.report.improved:
            save_adapter(recovery, tokenizer, adapter_folder)
        return recovery.merge(), recovery.report
