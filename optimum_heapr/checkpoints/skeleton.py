# Licensed under the Apache License, Version 2.0
"""A model without storage, as loading its checkpoint would give it: dtypes, conversions, generation config and all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from ..utils.tensor_files import TensorReader, checkpoint_files


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load_skeleton(auto_class: type, config: PreTrainedConfig, path: str, **options: Any) -> PreTrainedModel:
    """The model that `auto_class.from_pretrained(path)` gives, without storage; only headers of its files are read.

    Args:
        auto_class (`type`): auto class of the model.
        config (`PreTrainedConfig`): its configuration.
        path (`str`): a folder, or the name of a repository on the Hub.
        options: as for `from_pretrained`.

    Raises:
        HeaprError: if its weights are not safetensors.
    """
    names = ("revision", "token", "cache_dir", "subfolder")
    hub_options = {name: options.pop(name) for name in names if name in options}
    reader = TensorReader(checkpoint_files(path, **hub_options))
    trust = {"trust_remote_code": options.pop("trust_remote_code")} if "trust_remote_code" in options else {}
    with torch.device("meta"):
        model_class = type(auto_class.from_config(config, **trust))
    stored = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in reader.tensors.items()}
    model = model_class.from_pretrained(None, config=config, state_dict=stored, **{**options, "device_map": "meta"})
    model.config.name_or_path = path
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path, **hub_options)
        except OSError:  # then it is made from the configuration, as transformers does
            made = {"config_file_name": "config.json", "_from_model_config": True}
            model.generation_config = GenerationConfig.from_pretrained(path, **made, **hub_options)
    return model
