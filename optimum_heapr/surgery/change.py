# Licensed under the Apache License, Version 2.0
"""A model whose change broke off in the middle says so when it is used, in place of computing with half of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from ..experts import BROKEN_OFF, model_name
from ..utils.errors import HeaprError


if TYPE_CHECKING:
    import torch


USES = ("forward", "generate", "save_pretrained", "push_to_hub", "state_dict")
"""What of a model ends with an error then."""


class Change:
    """Whether a model is as it was still."""

    def __init__(self):
        self.has_begun = False

    def begins(self) -> None:
        """To be called before the first weight is touched."""
        self.has_begun = True


@contextmanager
def whole_or_refused(model: torch.nn.Module) -> Iterator[Change]:
    """What changes `model` in place, to the end; if it ends with an error after it began, the model refuses to be used.

    Args:
        model (`PreTrainedModel`): kept as it is where the error comes before the change begins.
    """
    change = Change()
    try:
        yield change
    except BaseException as error:
        if change.has_begun:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            message = (
                f"model={model_name(model)!r}: cutting it broke off in the middle ({reason}), so it is neither the unpruned nor "
                "the pruned model; load it again, and where memory is short apply the plan file by file, "
                "with memory='streaming' or optimum-cli heapr apply"
            )
            setattr(model, BROKEN_OFF, message)
            for part in (model, getattr(model, "base_model", model)):  # the body alone can be called as well
                for name in USES:
                    setattr(part, name, partial(_refuse, message))
        raise


def _refuse(message: str, *arguments: Any, **options: Any) -> NoReturn:
    raise HeaprError(message)
