# Licensed under the Apache License, Version 2.0
"""Where the losses of a training are reported to while it runs: the integrations of the `Trainer`, without paths of this machine."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..utils.errors import HeaprError
from .configuration import REPORTERS


if TYPE_CHECKING:
    from transformers import TrainerCallback

    from .configuration import RecoveryConfig


TENSORBOARD_FOLDER = "runs"
"""As torch's own writer has it: the folder of the run, which the integration would write to, is removed at its end."""


def check_reporting(config: RecoveryConfig) -> None:
    """Refuses what is not installed, before a model is loaded for it.

    Raises:
        HeaprError: naming it.
    """
    name = config.report_to
    if name is not None and not any(find_spec(package) for package in REPORTERS[name]):
        package = REPORTERS[name][0]
        raise HeaprError(f"report_to={name!r}: is not installed; pip install {package}, or leave it out")


def reporting_callbacks(config: RecoveryConfig) -> list[TrainerCallback]:
    """The integration that `config.report_to` names; none by default.

    What would be sent of a run are all arguments of the `Trainer` and the configuration of the model, and in them folders of this
    machine. Here it is the `RecoveryConfig`, without paths, and the number of parameters.
    """
    if config.report_to is None:
        return []
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    [integration] = get_reporting_integration_callbacks(config.report_to)

    class Reporting(integration):
        def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
            super().setup(
                _Arguments(args, config), state, SimpleNamespace(num_parameters=model.num_parameters), **kwargs
            )

    if config.report_to != "tensorboard":  # which writes files here, and has nothing to set up
        return [Reporting()]
    callback = integration()
    callback.logging_dir = callback.logging_dir or os.path.join(TENSORBOARD_FOLDER, time.strftime("%Y-%m-%d_%H-%M-%S"))
    return [callback]


class _Arguments:
    """The arguments of a `Trainer` that say of themselves what may be known elsewhere."""

    def __init__(self, arguments: Any, config: RecoveryConfig):
        self._arguments, self._config = arguments, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arguments, name)

    def to_dict(self) -> dict[str, Any]:
        return self._config.public().to_dict()
