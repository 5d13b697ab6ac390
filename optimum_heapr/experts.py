# Licensed under the Apache License, Version 2.0
"""What an expert block is: finding them in any model, and reading single atomic experts.

transformers 5 stores the experts of a layer in one module whose class is decorated with
`@use_experts_implementation` (transformers/integrations/moe.py). The decorator leaves a description of the storage on
each module (`is_transposed`, `is_concatenated`, `has_bias`, …), and that description is all this package goes by: there
is no table of model classes here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .utils.errors import HeaprError
from .utils.sharded import whole_parameters


if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPERT_PARAMETERS = {"gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"}
BROKEN_OFF = "_heapr_broken_off"
"""Attribute of a model that was being changed when that broke off: what to say about it."""

_INTERFACE_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class ExpertBlock:
    """The routed experts of one layer.

    Attributes:
        path (`str`): module path inside the model, e.g. `model.layers.3.mlp.experts`; the key of every artefact.
        module (`nn.Module`): the module that holds the weights of all experts of the layer.
        num_experts (`int`): experts in the block, E.
        width (`int`): atomic experts in one expert, I.
        hidden_size (`int`): features of the block's input and output, d.
    """

    path: str
    module: nn.Module
    num_experts: int
    width: int
    hidden_size: int

    def gate_up_rows(self, expert: int) -> torch.Tensor:
        """Rows of gate and up projection of one expert as [2, I, d]: gate first."""
        weight = self.module.gate_up_proj[expert]
        if self.module.is_transposed:
            weight = weight.T
        return split_gate_and_up(weight, self.module.is_concatenated)

    def gate_up_bias(self, expert: int) -> torch.Tensor | None:
        """Biases of gate and up projection of one expert as [2, I], or `None`."""
        if not self.module.has_bias:
            return None
        return split_gate_and_up(self.module.gate_up_proj_bias[expert], self.module.is_concatenated)

    def down_rows(self, expert: int) -> torch.Tensor:
        """Columns of the down projection of one expert, as rows: [I, d]."""
        weight = self.module.down_proj[expert]
        return weight if self.module.is_transposed else weight.T

    def atomic_norms(self) -> torch.Tensor:
        """Euclidean norm of each atomic expert's weights (gate row, up row, down column) in fp32, [E, I].

        Where processes share the weights, all of them must ask.
        """
        import torch
        from accelerate.utils import align_module_device

        norms = torch.empty(self.num_experts, self.width)
        with (
            align_module_device(self.module),
            whole_parameters(self.module),
        ):  # brings offloaded weights in, and all shards
            for expert in range(self.num_experts):
                squares = self.gate_up_rows(expert).detach().float().square().sum((0, 2))
                squares = squares + self.down_rows(expert).detach().float().square().sum(1)
                norms[expert] = squares.sqrt()
        return norms

    @property
    def device(self) -> torch.device:
        """Where the experts compute: for offloaded weights, which lie on the meta device, the device they are brought to."""
        import torch

        device = self.module.down_proj.device
        hook = getattr(self.module, "_hf_hook", None)
        return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device


def find_expert_blocks(model: nn.Module) -> list[ExpertBlock]:
    """All routed expert blocks of a model, in the order of its modules.

    Raises:
        HeaprError: if the model has none (a dense model, or a family whose experts are not on the experts interface of
            transformers), if it was pruned already, in whole or in part, or if its experts cannot be split into atomic
            experts exactly.
    """
    if hasattr(model, BROKEN_OFF):
        raise HeaprError(getattr(model, BROKEN_OFF))
    name = model_name(model)
    if getattr(model.config, "expert_widths", None) is not None:
        raise HeaprError(
            f"model={name!r}: was pruned already; start from the unpruned model, for which the statistics of the first time "
            "serve at any ratio"
        )
    blocks = [
        _checked_block(path, module, name)
        for path, module in model.named_modules()
        if all(hasattr(module, flag) for flag in _INTERFACE_FLAGS)
    ]
    if not blocks:
        raise HeaprError(
            f"model={name!r} (model_type {model.config.model_type!r}): has no routed experts on the experts interface of "
            "transformers; name a Mixture-of-Experts model such as qwen3_moe or mixtral"
        )
    return blocks


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module, such as a shared expert, is made of linear gate, up and down projections."""
    from torch import nn

    return all(isinstance(getattr(module, name, None), nn.Linear) for name in MLP_PROJECTIONS)


def experts_per_token(model: nn.Module) -> int | None:
    """How many experts the router picks; families call it differently."""
    config = model.config.get_text_config()
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    found = (getattr(config, name, None) for name in names)
    return next((number for number in found if isinstance(number, int)), None)


def model_name(model: nn.Module) -> str:
    """What a user calls this model: where it was loaded from, or else its class."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def _checked_block(path: str, module: nn.Module, model: str) -> ExpertBlock:
    refusal = refusal_reason(module)
    if refusal:
        raise HeaprError(f"model={model!r}: {path} ({type(module).__name__}) cannot be pruned exactly: {refusal}")
    num_experts, *sizes = module.down_proj.shape
    width, hidden_size = sizes if module.is_transposed else reversed(sizes)
    return ExpertBlock(path, module, num_experts, width, hidden_size)


def refusal_reason(module: nn.Module) -> str | None:
    """Why the experts of this module are not a sum of atomic experts that can be cut, or `None` if they are."""
    if not module.has_gate:
        return "its experts have no gate projection"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm follows each expert, so its output is not a sum over atomic experts"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over processes by expert parallelism; load it without a parallel plan"
    parameters = {name for name, _ in module.named_parameters()}
    if not {"gate_up_proj", "down_proj"} <= parameters <= EXPERT_PARAMETERS:
        return f"its parameters are {', '.join(sorted(parameters))}; expected gate_up_proj and down_proj"
    if any(parameter.dtype.itemsize < 2 for parameter in module.parameters()):
        return "its weights are quantized; load it dequantized, in bfloat16"
    return None


def split_gate_and_up(stacked: torch.Tensor, is_concatenated: bool) -> torch.Tensor:
    """[2I, …] as stored -> [2, I, …]: stored as all gate rows then all up rows, or interleaved one by one."""
    if is_concatenated:
        return stacked.unflatten(0, (2, -1))
    return stacked.unflatten(0, (-1, 2)).transpose(0, 1)


def stack_gate_and_up(gate_and_up: torch.Tensor, is_concatenated: bool) -> torch.Tensor:
    """[2, I, …] -> [2I, …] as stored: all gate rows then all up rows, or interleaved one by one."""
    return (gate_and_up if is_concatenated else gate_and_up.transpose(0, 1)).flatten(0, 1)


# How experts in the stock storage are computed


def suits_grouped_kernel(weight: torch.Tensor) -> bool:
    """Whether torch's grouped product takes a weight, [experts, rows, columns]: it wants rows of whole 16 bytes, and knows no
    float64."""
    rows_fit = all(size * weight.dtype.itemsize % 16 == 0 for size in weight.shape[1:])
    return rows_fit and weight.dtype.itemsize < 8


@contextmanager
def experts_of_any_width(model: PreTrainedModel) -> Iterator[None]:
    """Until the block ends, experts run as `eager` where the `grouped_mm` of transformers, its default, refuses their width.

    Experts of variable widths have a forward of their own, which takes any.
    """
    blocks = (dict(module.named_parameters(recurse=False)) for module in model.modules())
    weights = [block["down_proj"] for block in blocks if {"gate_up_proj", "down_proj"} <= block.keys()]
    if all(suits_grouped_kernel(weight) for weight in weights if weight.dim() == 3):
        yield
        return
    previous = model.get_experts_implementation()
    model.set_experts_implementation({part: "eager" if way == "grouped_mm" else way for part, way in previous.items()})
    try:
        yield
    finally:
        model.set_experts_implementation(previous)
