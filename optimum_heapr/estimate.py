# Licensed under the Apache License, Version 2.0
"""What pruning a model would give and take, before anything of it is loaded: from `config.json` and the index alone."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .calibration.estimate import MemoryEstimate
from .calibration.work import MODES, CalibrationWork
from .checkpoints.outline import load_outline, stored_bytes
from .configuration import HeaprConfig
from .evaluation.size import ModelSize
from .experts import experts_per_token, find_expert_blocks
from .planning.alignment import effective_multiple
from .utils.errors import HeaprError
from .utils.quantized import quantization_of


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .experts import ExpertBlock


RATIOS = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
FREE_SHARE = 0.1
"""Of the memory that a model is to fit into, what is left for the cache of keys and values and for activations."""


@dataclass(frozen=True)
class PrunedSize:
    """A model after some of its routed atomic experts have gone; zeros that a stock layout adds to shared experts come on top.

    Attributes:
        layout (`str`): `variable`, of which a part of a group may stay, or `uniform`, whose width is rounded up.
        ratio (`float`): share of routed atomic experts that go, reached.
        width (`int`, *optional*): of every expert, for `uniform`.
        parameters, active_parameters, weight_bytes (`int`): as of [`~optimum_heapr.evaluation.size.ModelSize`].
    """

    layout: str
    ratio: float
    width: int | None
    parameters: int
    active_parameters: int | None
    weight_bytes: int


@dataclass(frozen=True)
class ModeEstimate:
    """One way to calibrate.

    Attributes:
        mode (`str`): `plain`, `offload` or `streaming`.
        weights, statistics, activations (`int`): bytes at once where it computes; `offload` takes one layer or the head for
            its weights, as the least there must be room for.
        layer_inputs (`int`): bytes kept on host and disk.
        bytes_read (`int`): of weights.
        flops (`int`): operations of matrix products.
        seconds (`float`, *optional*): at the speeds that were given, reading and computing one after the other.
    """

    mode: str
    weights: int
    statistics: int
    activations: int
    layer_inputs: int
    bytes_read: int
    flops: int
    seconds: float | None


@dataclass(frozen=True)
class Estimate:
    """What [`estimate`] found.

    Attributes:
        model (`str`): its name.
        size (`ModelSize`): unpruned.
        routed_parameters (`int`): of all routed experts.
        experts (`list`): `[experts, width, layers]` of each kind of block.
        dtype (`str`): of its weights.
        stored_bytes (`int`, *optional*): as the checkpoint stores them, where it has an index.
        pruned (`list[PrunedSize]`): at each ratio and layout.
        calibration (`list[ModeEstimate]`): by mode.
        fitting (`dict`): by layout, the size with the least share removed that fits into the memory that was named, or `None`.
    """

    model: str
    size: ModelSize
    routed_parameters: int
    experts: list[tuple[int, int, int]]
    dtype: str
    stored_bytes: int | None
    pruned: list[PrunedSize]
    calibration: list[ModeEstimate]
    fitting: dict[str, PrunedSize | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def estimate(
    name: str | os.PathLike,
    config: HeaprConfig | None = None,
    ratios: tuple[float, ...] = RATIOS,
    memory: int | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
    dtype: str = "auto",
    **hub_options: Any,
) -> Estimate:
    """Sizes at each ratio and layout, and what each way to calibrate takes.

    Args:
        name (`str`): a folder with a `config.json`, the name of a repository on the Hub, or `demo`.
        config (`HeaprConfig`, *optional*): its calibration part, `width_multiple`, `align_for` and `tensor_parallel` are used.
        ratios (`tuple[float]`): shares of the routed atomic experts that go.
        memory (`int`, *optional*): bytes that the pruned weights are to fit into, with a tenth left over.
        tflops (`float`, *optional*): 10^12 operations a second of matrix products.
        bandwidth (`float`, *optional*): 10^9 bytes a second at which weights are read.
        dtype (`str`): as of [`~optimum_heapr.checkpoints.outline.load_outline`].
        hub_options: likewise.

    Raises:
        HeaprError: if the configuration cannot be read, its model has no experts that can be pruned, or a number is out of range.
    """
    for option, value in (("tflops", tflops), ("bandwidth", bandwidth)):
        if value is not None and not 0 < value < float("inf"):
            raise HeaprError(f"{option}={value}: must be a positive number")
    if (tflops is None) != (bandwidth is None):
        raise HeaprError(
            f"tflops={tflops}, bandwidth={bandwidth}: the time takes both, operations and bytes a second; name both, or neither"
        )
    wrong = next((ratio for ratio in ratios if not 0 < ratio < 1), None)
    if wrong is not None:
        raise HeaprError(f"ratio={wrong}: must be above 0 and below 1")
    config = HeaprConfig.checked(config)
    model = load_outline(name, dtype, **hub_options)
    blocks = find_expert_blocks(model)
    sizes = _Sizes(model, blocks, config)
    layouts = ("variable", "uniform") if len({block.width for block in blocks}) == 1 else ("variable",)
    pruned = [size for layout in layouts for ratio in ratios if (size := sizes.at(layout, ratio)) is not None]
    fitting = {} if memory is None else {layout: sizes.within(layout, memory * (1 - FREE_SHARE)) for layout in layouts}
    kinds = [(block.num_experts, block.width) for block in blocks]
    stored = stored_bytes(name, **hub_options)
    return Estimate(
        model=os.fspath(name),
        size=sizes.before,
        routed_parameters=sizes.atoms * sizes.each,
        experts=[(*kind, kinds.count(kind)) for kind in dict.fromkeys(kinds)],
        dtype=str(blocks[0].module.down_proj.dtype).removeprefix("torch."),
        stored_bytes=stored,
        pruned=pruned,
        calibration=_modes(model, config, tflops, bandwidth, stored),
        fitting=fitting,
    )


class _Sizes:
    """Sizes of one model, pruned."""

    def __init__(self, model: PreTrainedModel, blocks: list[ExpertBlock], config: HeaprConfig):
        self.before = ModelSize.of(model)
        self.atoms = sum(block.num_experts * block.width for block in blocks)
        self.layers, self.top_k = len(blocks), experts_per_token(model)
        self.width = blocks[0].width
        self.widths, self.config = [block.width for block in blocks], config
        self.each = 3 * blocks[0].hidden_size + 2 * bool(blocks[0].module.has_bias)
        self.itemsize = blocks[0].module.down_proj.element_size()

    def at(self, layout: str, ratio: float) -> PrunedSize | None:
        """The size nearest to a ratio, or `None` where the layout has none."""
        multiple = self._multiple(layout)
        if layout == "variable":
            removed = round(ratio * self.atoms) // multiple * multiple
            return self._without(layout, removed, None) if 0 < removed < self.atoms else None
        width = -(-round((1 - ratio) * self.width) // multiple) * multiple
        return self._uniform(width) if 0 < width < self.width else None

    def within(self, layout: str, num_bytes: float) -> PrunedSize | None:
        """The size with the least removed that takes at most so many bytes."""
        over = max(self.before.weight_bytes - num_bytes, 0)
        removed = -int(-over // (self.each * self.itemsize))
        multiple = self._multiple(layout)
        if layout == "variable":
            removed = -(-removed // multiple) * multiple
            return self._without(layout, removed, None) if removed < self.atoms else None
        experts = self.atoms // self.width
        width = (self.width - -(-removed // experts)) // multiple * multiple
        return self._uniform(width) if width > 0 else None

    def _multiple(self, layout: str) -> int:
        return effective_multiple(self.config.replace(layout=layout), self.widths)

    def _uniform(self, width: int) -> PrunedSize:
        return self._without("uniform", self.atoms - self.atoms // self.width * width, width)

    def _without(self, layout: str, removed: int, width: int | None) -> PrunedSize:
        active = self.before.active_parameters
        if active is not None and self.top_k is not None:  # a token meets the same share of wide and of narrow experts
            active = round(active - self.each * self.top_k * sum(self.widths) * removed / self.atoms)
        return PrunedSize(
            layout=layout,
            ratio=removed / self.atoms,
            width=width,
            parameters=self.before.parameters - removed * self.each,
            active_parameters=active,
            weight_bytes=self.before.weight_bytes - removed * self.each * self.itemsize,
        )


def _modes(
    model: PreTrainedModel, config: HeaprConfig, tflops: float | None, bandwidth: float | None, stored: int | None
) -> list[ModeEstimate]:
    work = CalibrationWork.of(model, config)
    plain = MemoryEstimate.of(model, config)
    streaming = MemoryEstimate.of(model, config, "streaming")
    # A quantized checkpoint is read as it is stored; offloading brings in what was dequantized before.
    share = stored / plain.weights if quantization_of(model.config) and stored else 1
    found = []
    for mode in MODES:
        needs = plain if mode == "plain" else streaming
        read, flops = work.bytes_read(mode), work.flops(mode)
        read = read if mode == "offload" else round(read * share)
        found.append(
            ModeEstimate(
                mode=mode,
                weights=needs.weights,
                # Hooks bring weights in layer by layer, but the sums of all layers stay.
                statistics=streaming.statistics if mode == "streaming" else plain.statistics,
                activations=needs.activations,
                layer_inputs=streaming.layer_inputs if mode == "streaming" else 0,
                bytes_read=read,
                flops=flops,
                seconds=flops / (tflops * 1e12) + read / (bandwidth * 1e9) if tflops else None,
            )
        )
    return found
