# Licensed under the Apache License, Version 2.0
"""Which layer of a pruned model made its loss jump: each is put back in turn as its checkpoint has it, one in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..evaluation.perplexity import window_losses
from ..layerwise.layers import StreamedModel
from ..utils.errors import HeaprError
from ..utils.logging import progress
from .loading import load_model, source_of


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..report.observation import Workload


WINDOWS = 4
"""Those that lost most, for each layer: enough to tell who did it."""


def find_culprit(
    model: PreTrainedModel, workload: Workload, before: list[float], after: list[float], path: str, **options: Any
) -> dict[str, Any]:
    """The layer whose return wins most back, on the windows that lost most.

    Takes a forward of the model on `WINDOWS` windows for each layer with routed experts, and the memory of one layer.

    Args:
        model (`PreTrainedModel`): pruned, in memory; it is as it was afterwards.
        workload (`Workload`): what it was measured on.
        before, after (`list[float]`): summed losses of its windows, unpruned and pruned.
        path (`str`): where the unpruned checkpoint is.
        options: as it was loaded with.

    Returns:
        `dict`: `layer`, its module path; `windows`, how many were measured on; on these, in nats a token, `increase` of the
        pruned model, and `restored`, what is left of that with the layer as it was.

    Raises:
        HeaprError: if the checkpoint cannot be read piece by piece, or is not that of the model.
    """
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise HeaprError("device_map: the model is spread over devices; load it on one to have the layer named")
    counts = [len(window) - 1 for window in workload.windows]
    rise = [(after[index] - before[index]) / count for index, count in enumerate(counts)]
    worst = sorted(range(len(rise)), key=rise.__getitem__, reverse=True)[:WINDOWS]
    windows, tokens = [workload.windows[index] for index in worst], sum(counts[index] for index in worst)

    def increase(losses: list[float]) -> float:
        return (sum(losses) - sum(before[index] for index in worst)) / tokens

    skeleton, _ = load_model(path, skeleton=True, **{**options, "experts_implementation": "eager"})
    unpruned = StreamedModel(skeleton, source_of(skeleton, **options), model.get_input_embeddings().weight.device)
    layers, restored = model.get_submodule(unpruned.path), {}
    routed = [index for index in range(len(layers)) if unpruned.blocks_of(index)]
    with progress(routed, desc="Looking for the layer", unit="layer") as bar:
        for index in bar:
            pruned = layers[index]
            with unpruned.layer(index) as whole:
                _check_same(whole, pruned, unpruned.blocks_of(index)[0].path, f"{unpruned.path}.{index}")
                layers[index] = whole
                try:
                    restored[f"{unpruned.path}.{index}"] = increase(window_losses(model, windows, workload.source))
                finally:
                    layers[index] = pruned
    layer = min(restored, key=restored.__getitem__)
    of_pruned = increase([after[index] for index in worst])
    return {"layer": layer, "windows": len(windows), "increase": of_pruned, "restored": restored[layer]}


def _check_same(whole: torch.nn.Module, pruned: torch.nn.Module, experts: str, path: str) -> None:
    """What pruning does not touch, such as attention, must be the same: else the model had changed since it was loaded."""
    mixture, kept = experts.removeprefix(f"{path}.").partition(".")[0], dict(pruned.named_parameters())
    for name, weight in whole.named_parameters():
        if mixture != name.partition(".")[0] and not (name in kept and torch.equal(kept[name], weight)):
            raise HeaprError(f"{path}.{name}: is not as in the checkpoint; prune what was loaded from it")
