# Licensed under the Apache License, Version 2.0
"""Which model families of the installed transformers can be pruned: found by looking, not typed."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from .experts import find_expert_blocks
from .utils.errors import HeaprError


# Families that the test-suite calibrates, prunes, saves and reloads; the others are prunable by their structure alone.
TESTED = (
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_moe",
)


@dataclass(frozen=True)
class Family:
    """One model type.

    Attributes:
        model_type (`str`): as in `config.json`.
        model_class (`str`): what it is loaded as.
        status (`str`): `tested`, `by structure` or `refused`.
        note (`str`): why it is refused, or what is unusual about it.
    """

    model_type: str
    model_class: str
    status: str
    note: str


def scan_families() -> list[Family]:
    """Looks at every Mixture-of-Experts family of the installed transformers that has a language-model head.

    Each is built from its default configuration without memory for weights (on the meta device) and searched for expert
    blocks, just as a checkpoint would be. Takes about ten seconds.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from .modeling.auto import modeling_source
    from .modeling.modeling_heapr import AUTO_CLASSES

    quiet = logging.getLogger("transformers")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    try:
        found = []
        for model_type in sorted(set(CONFIG_MAPPING.keys()) | {"deepseek"}):
            source = modeling_source(model_type)
            if model_type.startswith("heapr_") or not _is_mixture(source):
                continue
            config_class = CONFIG_MAPPING[model_type]
            if model_type == "deepseek":
                config_class()  # registers its model class
            for mapping in AUTO_CLASSES.values():
                if config_class in mapping:
                    found.append(_look_at(model_type, config_class, mapping[config_class], source))
                    break
        return found
    finally:
        quiet.setLevel(level)


def families_markdown(families: list[Family]) -> str:
    """The table of `docs/source/families.md`."""
    lines = ["| model type | class | status | note |", "|---|---|---|---|"]
    lines += [f"| `{f.model_type}` | {f.model_class} | {f.status} | {f.note} |" for f in families]
    return "\n".join(lines)


def _is_mixture(source: str) -> bool:
    return bool(re.search(r"^class \w*(?:Experts|SparseMoe|MoE|MOE)\w*\(", source, re.MULTILINE))


def _look_at(model_type: str, config_class: type, model_class: type, source: str) -> Family:
    from .modeling.auto import is_family
    from .utils.placement import without_storage

    name = model_class.__name__
    prunable = "tested" if model_type in TESTED else "by structure"
    if not is_family(model_type):
        return Family(model_type, name, "refused", "its experts are not on the experts interface of transformers")
    try:
        model = without_storage(lambda: model_class(config_class()))
    except Exception:  # some default configurations are not meant to be built; the flags in the source still tell
        for flag, reason in (
            ("has_gate=False", "no gate projection"),
            ("has_post_expert_norm=True", "post-expert norm"),
        ):
            if flag in source:
                return Family(model_type, name, "refused", reason)
        return Family(model_type, name, prunable, "")
    try:
        block = find_expert_blocks(model)[0].module
    except HeaprError as error:
        if "no routed experts" in str(error):
            return Family(model_type, name, prunable, "only configurations with routed experts; the default has none")
        return Family(model_type, name, "refused", str(error).partition("exactly: ")[2])
    flags = {"biases": block.has_bias, "transposed": block.is_transposed, "interleaved": not block.is_concatenated}
    return Family(model_type, name, prunable, ", ".join(flag for flag, is_set in flags.items() if is_set))
