# Licensed under the Apache License, Version 2.0
"""The sum of the groups of a layer's experts on a CPU, whose kernels know no map of experts that are elsewhere.

Each group is given a row for each of its pieces that a token needs. What is around the kernels is kept small: with one token a
layer takes a millisecond, and an operation of torch up to 20 µs.
"""

from functools import cache

import torch
import torch.nn.functional as F
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.zentorch_moe import ZentorchExpertsInt4

from ..utils.scratch import Scratch


# Bounds the memory of what experts give, and is enough for their weights not to be read much more often.
TOKENS_AT_ONCE = 512

# What the interface of kernels has and those for the CPU do not use.
_UNUSED = dict.fromkeys(("expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta"))


def sum_on_cpu(layer, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    """What the experts of a layer give to tokens.

    Args:
        layer ([`VariableWidths`]): the experts, in groups.
        x (`torch.Tensor`): tokens, of shape `(tokens, hidden)`.
        topk_weights (`torch.Tensor`), topk_ids (`torch.Tensor`): router weights and numbers of the experts of each token, of shape
            `(tokens, experts a token)`.

    Returns:
        `torch.Tensor` of shape `(tokens, hidden)`, of the type of `x`
    """
    out = torch.empty_like(x)
    for start in range(0, len(x), TOKENS_AT_ONCE):
        some = slice(start, start + TOKENS_AT_ONCE)
        out[some] = _sum_of_some(layer, x[some], topk_weights[some], topk_ids[some])
    return out


@torch.library.custom_op("heapr::experts", mutates_args=())
def _experts(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    """Hides from torch.compile that the number of tokens of a group is not known beforehand."""
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    return sum_on_cpu(layer, x, topk_weights, topk_ids)


@_experts.register_fake
def _(x, topk_weights, topk_ids, layer_name):
    return torch.empty_like(x)


def _sum_of_some(layer, x, topk_weights, topk_ids):
    slots = layer.slots[:, topk_ids]
    needed = slots >= 0
    tokens, choices = needed.nonzero().T[1:]  # in the order of the groups
    weights, slots = topk_weights[tokens, choices, None], slots[needed].unsqueeze(1)
    counts = needed.sum((1, 2)).tolist()
    scratch, start = _scratch(x.dtype), 0
    made, given = scratch("made", len(tokens), x.shape[1]), scratch("given", max(counts), x.shape[1])
    for group, count in zip(layer.groups, counts):
        if count:
            piece = slice(start, start := start + count)
            torch.index_select(x, 0, tokens[piece], out=given[:count])
            _run(group, made[piece], given[:count], weights[piece], slots[piece])
    if len(x) == 1:
        return made.sum(0, keepdim=True)
    starts = F.pad(needed.sum((0, 2)).cumsum(0), (1, 0))
    return F.embedding_bag(tokens.argsort(stable=True), made, starts, mode="sum", include_last_offset=True)


@cache
def _scratch(dtype: torch.dtype) -> Scratch:
    """Rows of all layers: fresh pages would take as long as the sums."""
    return Scratch(dtype, torch.device("cpu"))


def _run(group, out: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor) -> None:
    """One expert for each row. Straight to the kernel, as what vLLM does around it takes longer than a few tokens do."""
    kernel = getattr(group.quant_method, "moe_kernel", None)
    experts = kernel and kernel.fused_experts
    if isinstance(experts, ZentorchExpertsInt4):
        _in_four_bits(group, experts, out, x, weights, slots)
    elif isinstance(experts, CPUUnquantizedExperts) and not group.apply_router_weight_on_input:
        experts.apply(
            output=out,
            hidden_states=x,
            w1=group.w13_weight,
            w2=group.w2_weight,
            topk_weights=weights,
            topk_ids=slots,
            activation=group.activation,
            global_num_experts=len(group.members),
            apply_router_weight_on_input=False,
            **_UNUSED,
        )
    else:
        out.copy_(group.run(x, weights, slots))


def _in_four_bits(group, experts: ZentorchExpertsInt4, out, x, weights, slots) -> None:
    """The kernel without vLLM's class around it, which finds the experts of a token by itself."""
    torch.ops.zentorch.zentorch_fused_moe(
        out,
        x,
        group.w13_weight,
        group.w2_weight,
        None,  # biases
        None,
        weights,
        slots,
        False,  # router weights are applied to what experts give
        group.activation.value,
        experts.w1_scale,
        experts.w2_scale,
    )
