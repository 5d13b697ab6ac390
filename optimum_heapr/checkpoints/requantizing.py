# Licensed under the Apache License, Version 2.0
"""Puts a pruned checkpoint into FP8 again, as the one that it was made from: the same layers, in blocks of the same size.

What pruning left as it was keeps its numbers. What it changed, which is the experts, gets new scales from transformers' own operation:
atomic experts are removed one by one, so that the weights of one block come from several.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..experts import find_expert_blocks
from ..surgery.feasibility import width_ahead
from ..surgery.stock import stock_width
from ..utils.errors import HeaprError
from ..utils.files import write_json
from ..utils.logging import progress
from ..utils.quantized import quantization_of
from ..utils.tensor_files import TensorReader, checkpoint_files, write_tensors
from .origins import hub_options_in, load_configuration


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..configuration import HeaprConfig
    from ..planning.plan import PruningPlan


def check_requantizing(
    config: HeaprConfig,
    name: str | os.PathLike,
    plan: PruningPlan | None = None,
    model: PreTrainedModel | None = None,
    **model_options: Any,
) -> dict[str, Any]:
    """Refuses what cannot be written in FP8 again.

    Args:
        config (`HeaprConfig`): what is pruned by.
        name (`str`): where the unpruned model is.
        plan (`PruningPlan`, *optional*): what stays, once that is known.
        model (`PreTrainedModel`, *optional*): the unpruned model, before anything is measured; only shapes are read.
        model_options: as of [`~optimum_heapr.checkpoints.loading.load_model`]; where the model is on the Hub is read.

    Returns:
        `dict`: how the unpruned model is quantized, as its configuration says.

    Raises:
        HeaprError: if its experts do not keep one width, of whole blocks, or the unpruned model is not in FP8 blocks.
    """
    if config.layout == "variable":
        raise HeaprError(
            "requantize=True: is for experts of one width, and layout='variable' gives each its own; plan with layout='uniform' "
            "and align_for='fp8', or width_multiple for blocks of less than 128, or leave it out"
        )
    saved = quantization_of(load_configuration(name, **model_options))
    if saved.get("quant_method") != "fp8" or not saved.get("weight_block_size"):
        kind = saved.get("quant_method", "unquantized")
        raise HeaprError(
            f"requantize=True: is for models in FP8 with a scale for each block, and {os.fspath(name)!r} is not ({kind}); leave it "
            "out, and quantize what is written"
        )
    block = max(saved["weight_block_size"])
    if plan is not None:
        _check_width(stock_width(plan), True, block)
    elif model is not None:
        widest = max(experts.width for experts in find_expert_blocks(model))
        if widest < block:
            raise HeaprError(
                f"requantize=True: {block} weights share a scale, and experts of this model are {widest} wide; leave it out"
            )
        _check_width(*width_ahead(model, config), block)
    return saved


def _check_width(width: int, is_known: bool, block: int) -> None:
    if width % block:
        kept = (
            f"the width {width} is no multiple of the"
            if is_known
            else f"widths will be multiples of {width}, not of the"
        )
        raise HeaprError(
            f"requantize=True: {kept} {block} weights that share a scale; plan with width_multiple={block}"
        )


def requantize(folder: Path, plan: PruningPlan, name: str, **model_options: Any) -> None:
    """Puts the weights of a folder into FP8 that are in FP8 in the model they were made from; a tensor is in memory at a time.

    Args:
        folder (`Path`): a pruned checkpoint of a stock layout in floating point, which nobody reads yet.
        plan (`PruningPlan`): what it was pruned by.
        name (`str`): where the unpruned model is.
        model_options: as of [`check_requantizing`].

    Raises:
        HeaprError: as [`check_requantizing`].
    """
    saved = check_requantizing(plan.config, name, plan, **model_options)
    pair = _Pair(TensorReader(checkpoint_files(name, **hub_options_in(model_options))), saved)
    files = sorted(folder.glob("*.safetensors"))
    weight_map, total = {}, 0
    for path in progress(files, desc="Quantizing", unit="file"):
        for tensor, (dtype, shape) in _rewrite(path, pair).items():
            weight_map[tensor] = path.name
            total += torch.Size(shape).numel() * dtype.itemsize
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        metadata = json.loads(index.read_text(encoding="utf-8"))["metadata"]
        found = {"metadata": {**metadata, "total_size": total}, "weight_map": weight_map}
        index.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {**config, "quantization_config": saved})


class _Pair:
    """Weights and scales.

    Args:
        source (`TensorReader`): the unpruned checkpoint.
        saved (`dict`): how it is quantized.
    """

    def __init__(self, source: TensorReader, saved: dict[str, Any]):
        from transformers.quantizers.auto import AutoHfQuantizer

        from ..utils.fp8 import METHOD

        self.source, self.block = source, saved["weight_block_size"]
        self.quantizer = AutoHfQuantizer.from_config({**saved, "quant_method": METHOD, "dequantize": True})

    def name_of_scales(self, name: str) -> str | None:
        """What the unpruned checkpoint calls the scales of a weight, if it is in FP8 there."""
        module = name.removesuffix("weight")
        others = (f"{name}_scale_inv", f"{module}scale", f"{module}qscale_weight")
        return next((other for other in others if name in self.source.tensors and other in self.source.tensors), None)

    def kinds(self, name: str, shape: tuple[int, ...]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of a weight and of its scales: of these float32, which holds what it is told in fewer bits."""
        dtype = self.source.tensors[self.name_of_scales(name)].dtype
        grid = tuple(-(-size // step) for size, step in zip(shape, self.block))
        return [
            (self.source.tensors[name].dtype, shape),
            (torch.float32 if dtype.is_floating_point and dtype.itemsize > 1 else dtype, grid),
        ]

    def of(self, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight and its scales: those of the unpruned checkpoint where they stand for this very tensor."""
        from ..utils.fp8 import dequantized, quantized

        if self.source.tensors[name].shape == tensor.shape:
            stored = self.source.read(name), self.source.read(self.name_of_scales(name))
            if torch.equal(dequantized(self.quantizer, *stored, tensor.dtype), tensor):
                return stored
        return quantized(self.quantizer, tensor)


def _rewrite(path: Path, pair: _Pair) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Writes a file anew, and gives what is in it."""
    reader = TensorReader([path])
    made, weights = {}, {}
    for name, info in reader.tensors.items():
        made[name] = (info.dtype, info.shape)
        if scales := pair.name_of_scales(name):
            made[name], made[scales] = pair.kinds(name, info.shape)
            weights |= {name: (name, 0), scales: (name, 1)}

    def parts(name: str) -> Iterator[torch.Tensor]:
        if name not in weights:
            yield reader.read(name)
            return
        # Scales are written long before their weights: what is made is not kept for that.
        weight, which = weights[name]
        yield pair.of(weight, reader.read(weight))[which]

    written = path.with_suffix(".tmp")
    write_tensors(written, made, parts, {"format": "pt"})
    os.replace(written, path)
    return made
