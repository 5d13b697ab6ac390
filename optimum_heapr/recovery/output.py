# Licensed under the Apache License, Version 2.0
"""What a recovery run leaves: an adapter, or a merged model with what stood beside the pruned one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.orientation import written_as_stored
from ..checkpoints.originals import carry_over
from ..hub.base_model import BaseModel
from ..hub.card import point_to_folder
from ..hub.card import without_measurements as card_without_measurements
from ..planning.plan import PruningPlan
from ..report.content import without_measurements
from ..report.files import read_report, write_report
from ..utils.companions import (
    CARD_NAME,
    OWN_NAMES,
    PLAN_NAME,
    RECOVERY_NAME,
    REPORT_NAME,
    STATISTICS_NAME,
    find_file,
    find_own,
    own_folder,
)
from ..utils.files import replace_folder, write_json
from ..utils.public import public_name


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .runner import Recovery


def plan_of(model: str | os.PathLike) -> PruningPlan | None:
    """The plan that a pruned model was cut by, if it stands beside it."""
    path, _ = find_own(model, PLAN_NAME)
    return PruningPlan.load(path) if path else None


def save_adapter(
    recovery: Recovery,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike,
    overwrite: bool = False,
) -> Path:
    """Writes an adapter in the format of PEFT, the tokenizer, `recovery_report.json` and a card.

    Raises:
        HeaprError: if the folder cannot be written or is not empty.
    """
    with replace_folder(folder, overwrite) as temporary:
        recovery.model.save_pretrained(temporary)
        _name_base(temporary / "adapter_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        (temporary / CARD_NAME).write_text(_ADAPTER_CARD, encoding="utf-8")
        recovery.report.add_to(temporary)
    return Path(folder)


def _name_base(path: Path) -> None:
    """Leaves of the place of the pruned model its name, which is looked for beside the adapter."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = public_name(config["base_model_name_or_path"]).rstrip("/")
    write_json(path, config)


def save_merged(
    recovery: Recovery,
    tokenizer: PreTrainedTokenizerBase | None,
    pruned: str | os.PathLike,
    folder: str | os.PathLike,
    overwrite: bool = False,
) -> Path:
    """Merges, and writes the model with the plan, the configuration and the card of the pruned one.

    Args:
        recovery (`Recovery`): its model is merged in place.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): saved beside it.
        pruned (`str`): folder or name of the pruned model.
        folder (`str`): appears whole or not at all.
        overwrite (`bool`): replace a folder that this package wrote, if it holds nothing else.

    Raises:
        HeaprError: if the folder cannot be written or is not empty.
    """
    with replace_folder(folder, overwrite) as temporary:
        merged = recovery.merge()
        written_as_stored(merged)
        merged.save_pretrained(temporary)
        is_stock = getattr(merged.config, "expert_widths", None) is None
        carry_over(temporary, merged, tokenizer, BaseModel.of(merged), is_stock)
        _copy_companions(pruned, temporary)
        _drop_measurements(temporary)
        recovery.report.add_to(temporary)
    return Path(folder)


def _copy_companions(pruned: str | os.PathLike, folder: Path) -> None:
    """What stands beside the pruned model, but for statistics, and for the report of a recovery, as there is a new one."""
    ours = own_folder(folder)
    for name in OWN_NAMES:
        path = None if name in (STATISTICS_NAME, RECOVERY_NAME) else find_own(pruned, name)[0]
        if path is not None:
            shutil.copyfile(path, ours / name)
    path, _ = find_file(pruned, CARD_NAME)
    if path is not None:
        card = Path(path).read_text(encoding="utf-8")
        (folder / CARD_NAME).write_text(point_to_folder(card), encoding="utf-8")


def _drop_measurements(folder: Path) -> None:
    """Takes what was measured of the model before it was trained out of its report and its card."""
    ours = own_folder(folder)
    if (ours / REPORT_NAME).is_file():
        reason = "the model was trained after it was cut and measured"
        write_report(ours, without_measurements(read_report(ours / REPORT_NAME), reason))
    if (folder / CARD_NAME).is_file():
        card = (folder / CARD_NAME).read_text(encoding="utf-8")
        (folder / CARD_NAME).write_text(card_without_measurements(card), encoding="utf-8")


_ADAPTER_CARD = """---
library_name: peft
tags:
- lora
- heapr
- optimum-heapr
---

# Recovery adapter of a pruned model

Trained on a model that optimum-heapr pruned, and of use with that model alone; `adapter_config.json` says which.

```python
import optimum_heapr  # makes transformers know the pruned model
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/the/pruned/model")
model = PeftModel.from_pretrained(model, "path/to/this/adapter")
```
"""
