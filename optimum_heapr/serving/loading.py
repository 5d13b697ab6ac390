# Licensed under the Apache License, Version 2.0
"""Tensors of experts of a checkpoint, put where the pieces of the experts are."""

from __future__ import annotations

import re
from math import ceil

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from ..modeling.atomic_experts import storage_order
from .errors import ServingError


_PER_EXPERT = re.compile(r"(\d+)\.(\w+)\.(weight|weight_packed|weight_scale|weight_shape|bias)")


class LoadsExperts:
    """Mixed into [`VariableWidths`]: called by the model with what follows `experts.` in the name of a tensor."""

    def load(self, name: str, tensor: torch.Tensor) -> list[str]:
        """Puts a tensor of the checkpoint where its pieces are.

        Args:
            name (`str`): its name after `experts.`: `3.gate_proj.weight`, or that of a tensor of all experts.
            tensor (`torch.Tensor`): in the shape that the checkpoint has.

        Returns:
            `list[str]`: names of the parameters that were written, relative to this module.

        Raises:
            [`ServingError`]: if the name is none of an expert's, the shape is not that of its width, or it is of another scheme.
        """
        if name == "down_proj_bias":
            return self._load_down_biases(tensor)
        if name in ("gate_up_proj", "gate_up_proj_bias", "down_proj"):
            return self._load_packed(name, tensor)
        match = _PER_EXPERT.fullmatch(name)
        part = match and self._shards().get(match[2])
        if part is None or int(match[1]) >= len(self.widths):
            raise ServingError(f"{self.layer_name}.{name}: no tensor of experts of this model")
        return self._load_part(int(match[1]), part, match[3], tensor)

    def _shards(self) -> dict[str, str]:
        default = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
        return default | {
            self.ckpt_gate_proj_name: "w1",
            self.ckpt_down_proj_name: "w2",
            self.ckpt_up_proj_name: "w3",
        }

    def _load_part(self, expert: int, part: str, kind: str, tensor: torch.Tensor) -> list[str]:
        width, hidden = self.widths[expert], self.moe_config.hidden_dim_unpadded
        parameter = ("w2_" if part == "w2" else "w13_") + kind
        if width:  # of no weights the scheme does not matter
            self._check_kind(expert, parameter, kind, tensor)
        rows, columns = (hidden, width) if part == "w2" else (width, hidden)
        each = self.scheme.columns_of(kind) if self.scheme else 1
        expected = [rows, ceil(columns / each) if each else 1]
        expected = {"bias": [width], "weight_shape": [rows, columns]}.get(kind, expected)
        found = tensor.tolist() if kind == "weight_shape" else list(tensor.shape)
        if found != expected:
            raise ServingError(
                f"{self.layer_name}: expert {expert} has a tensor of shape {found}, and config.json gives it "
                f"{expected}; the files belong to different models: copy or prune it again"
            )
        written = []
        for group, start in self.pieces.starts(expert):
            written.append(f"groups.{group}.{parameter}")
            if kind == "weight_shape" or not width:
                continue
            piece = tensor
            if part != "w2":
                piece = _part_of(tensor, 0, start, self.pieces.widths[group])
            elif each:  # a scale of a whole row of a down projection is that of all its pieces
                piece = _part_of(tensor, 1, start // each, self.pieces.widths[group] // each)
            self._write(self.groups[group], parameter, part, expert, piece)
        self.loaded.add((expert, f"{part}.{kind}"))
        return written

    def _check_kind(self, expert: int, parameter: str, kind: str, tensor: torch.Tensor) -> None:
        """Refuses what is stored in another scheme than that of `config.json`: numbers of one type mean nothing in the other."""
        place = getattr(self.groups[0], parameter, None)
        if place is None or (kind != "weight_shape" and place.is_floating_point() != tensor.is_floating_point()):
            is_plain = isinstance(self.groups[0].quant_method, UnquantizedFusedMoEMethod)
            scheme = "not quantized" if is_plain else f"in {self.scheme}"
            raise ServingError(
                f"{self.layer_name}: expert {expert} has a tensor {kind} of {tensor.dtype}, and by config.json experts there are "
                f'{scheme}; copy the checkpoint again, or quantize it with its experts as linear layers (experts_as="linear")'
            )

    def _write(self, group: RoutedExperts, name: str, part: str, expert: int, piece: torch.Tensor) -> None:
        parameter = getattr(group, name)
        if part != "w2" and self.moe_config.activation == MoEActivation.SWIGLUOAI:  # its rows are stored in turn
            rows = parameter.data[group.members[expert]][0 if part == "w1" else 1 :: 2]
            rank, share = self.moe_config.tp_rank, piece.shape[0] // self.moe_config.tp_size
            rows[:share].copy_(piece.narrow(0, rank * share, share))
        else:
            parameter.weight_loader(parameter, piece, name, part, expert, return_success=True)

    def _load_down_biases(self, biases: torch.Tensor) -> list[str]:
        """The bias is added once: by an expert's first piece, and by the first of the ranks that share it."""
        if self.moe_config.tp_rank == 0:
            for expert, bias in enumerate(biases):
                group = self.groups[self.pieces.groups_of[expert][0]]
                group.w2_bias.data[group.members[expert], : bias.shape[0]].copy_(bias)
        return [f"groups.{group}.w2_bias" for group in range(len(self.groups))]

    def _load_packed(self, name: str, tensor: torch.Tensor) -> list[str]:
        """A tensor of all experts, in the order in which `AtomicExperts` stores them."""
        order, factor = storage_order(self.widths), 1 if name == "down_proj" else 2
        if tensor.shape[0] != factor * sum(self.widths):
            raise ServingError(
                f"{self.layer_name}.{name} has {tensor.shape[0]} rows, and config.json gives it "
                f"{factor * sum(self.widths)}; the files belong to different models: copy or prune it again"
            )
        written, kind = [], "bias" if name.endswith("_bias") else "weight"
        for expert, rows in zip(order, tensor.split([factor * self.widths[expert] for expert in order])):
            if name == "down_proj":
                written += self._load_part(expert, "w2", kind, rows.T)
                continue
            interleaved = self.moe_config.activation == MoEActivation.SWIGLUOAI
            gate, up = (rows[::2], rows[1::2]) if interleaved else rows.chunk(2)
            written += self._load_part(expert, "w1", kind, gate) + self._load_part(expert, "w3", kind, up)
        return written

    def missing(self) -> list[str]:
        """Projections of experts that no tensor was loaded for."""
        kinds = ["weight_packed" if hasattr(self.groups[0], "w2_weight_packed") else "weight"]
        kinds += ["weight_scale"] if hasattr(self.groups[0], "w2_weight_scale") else []
        parts = [f"{part}.{kind}" for kind in kinds for part in ("w1", "w2", "w3")]
        parts += ["w1.bias", "w3.bias"] if self.moe_config.has_bias else []
        return [
            f"expert {expert} {part}"
            for expert, width in enumerate(self.widths)
            for part in parts
            if width and (expert, part) not in self.loaded
        ]


def _part_of(tensor: torch.Tensor, dim: int, start: int, size: int) -> torch.Tensor:
    """So many rows or columns from a first one on; behind the last one zeros."""
    part = tensor.narrow(dim, start, min(size, tensor.shape[dim] - start))
    padding = (0, size - part.shape[dim])
    return F.pad(part, padding if dim == tensor.ndim - 1 else (0, 0, *padding))
