# Licensed under the Apache License, Version 2.0
"""What a calibration will need at once, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..experts import find_expert_blocks
from ..layerwise import memory
from ..layerwise.decoder import decoder_layers
from ..layerwise.memory import activation_budget, processes_here
from ..utils.placement import default_device
from .loss import CHUNK_ELEMENTS


if TYPE_CHECKING:
    from ..configuration import HeaprConfig
    from ..experts import ExpertBlock


@dataclass
class MemoryEstimate:
    """What a calibration will need at once, before anything is loaded.

    Attributes:
        mode (`str`): how it is calibrated: `plain`, `offload` or `streaming`.
        weights (`int`): bytes of the weights.
        statistics (`int`): bytes of the sums.
        activations (`int`): bytes that forward and backward of one micro-batch take, roughly: what a layer keeps depends
            on the attention and on the kernels.
        available (`int`): bytes there are.
        device (`torch.device`): where.
        layer_inputs (`int`): bytes of the inputs of all layers for all data, which `streaming` keeps.
        layer_inputs_on_host (`int`): how much of that stays in the memory of the host; the rest goes to the disk.
    """

    mode: str
    weights: int
    statistics: int
    activations: int
    available: int
    device: torch.device
    layer_inputs: int = 0
    layer_inputs_on_host: int = 0

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        config: HeaprConfig,
        mode: str = "plain",
        activation_memory: int | None = None,
    ) -> MemoryEstimate:
        """Estimates the calibration of a model, which may be without storage.

        Args:
            model (`PreTrainedModel`): only shapes and dtypes are read.
            config (`HeaprConfig`): its calibration part is used.
            mode (`str`): `plain`, where everything is in memory at once, or `streaming`, where a layer is. What
                `offload` needs follows from what there is, so it is stated as for `plain`.
            activation_memory (`int`, *optional*): budget for layer inputs on the host; by default a quarter of it.

        Raises:
            HeaprError: for `streaming`, if the experts are not in one list of layers.
        """
        blocks = find_expert_blocks(model)
        device = default_device()
        if device.type != "cuda":  # of other accelerators nothing is asked but what the host has
            device = torch.device("cpu")
        activations = activation_bytes(model, blocks, config)
        graph = activations.kept * model.config.get_text_config().num_hidden_layers
        estimate = cls(
            mode,
            weights=_bytes_of(model.parameters()),
            statistics=_statistics_bytes(blocks, config) * (2 if config.skip_nonfinite else 1),
            activations=graph + max(activations.passing, activations.head),
            available=memory.available_bytes(device) // (1 if device.type == "cuda" else processes_here()),
            device=device,
        )
        if mode == "streaming":
            _, layers = decoder_layers(model, blocks)
            of_layers = [_bytes_of(layer.parameters()) for layer in layers]
            inside = {id(module) for layer in layers for module in layer.modules()}
            at_once = [
                [block for block in blocks if id(block.module) in set(map(id, layer.modules()))] for layer in layers
            ]
            estimate.weights = max(*of_layers, _bytes_of(_own_parameters(model, inside)))
            estimate.statistics = max(_statistics_bytes(part, config) for part in at_once)
            estimate.activations = max(activations.kept + activations.passing, activations.head)
            tokens = -(-config.num_samples // processes_here()) * config.seq_length
            width = model.config.get_text_config().hidden_size
            # The inputs of all layers, and the gradients of one.
            estimate.layer_inputs = (len(layers) + 2) * tokens * width * blocks[0].module.down_proj.dtype.itemsize
            estimate.layer_inputs_on_host = min(estimate.layer_inputs, activation_budget(activation_memory))
        return estimate

    @property
    def fits(self) -> bool:
        """Whether a tenth of the memory would be left."""
        needed = self.weights + self.statistics + self.activations
        if self.device.type == "cpu":
            needed += self.layer_inputs_on_host
        return needed <= 0.9 * self.available

    def __str__(self) -> str:
        sizes = (self.weights, self.statistics, self.activations, self.available)
        weights, sums, activations, available = (f"{size / 2**30:.2f} GiB" for size in sizes)
        text = (
            f"memory {self.mode}: needs {weights} for weights, {sums} for statistics and about {activations} for activations, of "
            f"{available} on {self.device}"
        )
        if self.mode == "streaming":
            disk = (self.layer_inputs - self.layer_inputs_on_host) / 2**30
            text += (
                f"; and {self.layer_inputs_on_host / 2**30:.2f} GiB of the host and {disk:.2f} GiB of disk for the inputs of "
                "all layers"
            )
        return text


class ActivationBytes(NamedTuple):
    """Bytes of one micro-batch.

    Attributes:
        kept (`int`): of a layer, for the backward.
        passing (`int`): of a layer while it computes, besides.
        head (`int`): of the logits and their softmax, which is made of a chunk of tokens at a time.
    """

    kept: int
    passing: int
    head: int


ALLOCATION_LOSS = 1.2
"""What allocators take besides, as measured; `benchmarks/activations.py`."""


def activation_bytes(model: torch.nn.Module, blocks: list[ExpertBlock], config: HeaprConfig) -> ActivationBytes:
    """What the activations of one micro-batch take, from the shapes of a layer with gated experts and attention.

    A layer keeps, for each token: of each expert it is routed to, gate and up, the activated gate, their product, and the
    output; the input of two norms in float32; queries and the attention's output, keys and values, and in float32 queries
    and keys once more; and the probabilities, where attention is computed as matrices (`eager`).
    """
    text = model.config.get_text_config()
    size, samples = blocks[0].module.down_proj.dtype.itemsize, config.batch_size
    tokens = samples * config.seq_length
    hidden, width = blocks[0].hidden_size, max(block.width for block in blocks)
    top_k = getattr(text, "num_experts_per_tok", None) or 1
    shared = getattr(text, "shared_expert_intermediate_size", None) or width * (
        getattr(text, "n_shared_experts", 0) or 0
    )
    heads = getattr(text, "num_attention_heads", 1)
    head_size = getattr(text, "head_dim", None) or hidden // heads
    queries, keys = heads * head_size, (getattr(text, "num_key_value_heads", None) or heads) * head_size
    kept = tokens * (
        size * (top_k * (hidden + 4 * width) + 4 * shared + 2 * (queries + keys)) + 4 * (2 * hidden + queries + keys)
    )
    passing = tokens * size * top_k * (3 * hidden + 4 * width)
    if getattr(text, "_attn_implementation", None) == "eager":
        probabilities = samples * heads * config.seq_length**2 * size
        kept, passing = kept + probabilities, passing + 2 * probabilities
    logits = tokens * text.vocab_size
    head = logits * size + 2 * min(logits, CHUNK_ELEMENTS) * 4
    return ActivationBytes(*(int(ALLOCATION_LOSS * part) for part in (kept, passing, head)))


def _statistics_bytes(blocks: list[ExpertBlock], config: HeaprConfig) -> int:
    sums = 3 * sum(block.num_experts * block.width for block in blocks)
    return 4 * (sums + (2 * sum(b.num_experts * b.width**2 for b in blocks) if config.needs_grams else 0))


def _bytes_of(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.dtype.itemsize for parameter in {id(p): p for p in parameters}.values())


def _own_parameters(model: torch.nn.Module, inside: set[int]) -> Iterator[torch.nn.Parameter]:
    """Parameters of all modules but these."""
    for module in model.modules():
        if id(module) not in inside:
            yield from module.parameters(recurse=False)
