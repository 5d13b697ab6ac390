# Licensed under the Apache License, Version 2.0
"""Configurations of pruned models as vLLM is to see them: those of the unpruned family, with the widths.

vLLM has rules for model types ("deepseek_v2" has latent attention), so a pruned model's type must be the family's there. It is
changed where vLLM reads configurations, and nowhere else: transformers, in the same process, has pruned models as always.
"""

from __future__ import annotations

import vllm
from transformers import PreTrainedConfig

from .errors import ServingError
from .families import refusal


PREFIX = "heapr_"


class ReadsPrunedModels:
    """Mixed into vLLM's class that reads `config.json`."""

    def parse(self, *args, **kwargs) -> tuple[dict, PreTrainedConfig]:
        values, config = super().parse(*args, **kwargs)
        if config.model_type.startswith(PREFIX):
            family = config.model_type.removeprefix(PREFIX)
            if reason := refusal(family, vllm.__version__):
                raise ServingError(reason)
            config.model_type = family
        return values, config
