# Licensed under the Apache License, Version 2.0
"""What of a model depends on which field of its configuration: found by building it anew, without storage, and looking at shapes.

There is no table of families here. The model's class is made from a changed configuration on the meta device; what has
another shape then is what the field sets.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .experts import experts_per_token, model_name
from .utils.errors import HeaprError
from .utils.placement import without_storage


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .experts import ExpertBlock


def build(model: PreTrainedModel, blocks: list[ExpertBlock], fields: dict[str, int]) -> PreTrainedModel | None:
    """The model's class made from a changed configuration, without storage; `None` if it cannot be made."""
    # The sub-configuration of the experts must be changed inside the copy of the whole.
    config, part = copy.deepcopy((model.config, experts_config(model, blocks)))
    try:
        for name, value in fields.items():
            setattr(part, name, value)
        return without_storage(lambda: type(model)(config))
    except Exception:  # the field means something else: sizes of an attention that no longer divide, and so on
        if not fields:
            raise
        return None


def experts_config(model: PreTrainedModel, blocks: list[ExpertBlock]) -> PreTrainedConfig:
    """The part of the model's configuration that its experts are made from."""
    parts = [model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)]
    own = getattr(blocks[0].module, "config", None)
    return next((part for part in parts if part is own), model.config.get_text_config())


def fields_with_value(config: PreTrainedConfig, value: int) -> list[str]:
    """Fields of a configuration that hold this integer, those that speak of experts first."""
    names = [name for name, held in vars(config).items() if type(held) is int and held == value and name[0] != "_"]
    return sorted(names, key=lambda name: not any(word in name for word in ("moe", "expert", "intermediate")))


def with_other_names(config: PreTrainedConfig, name: str) -> list[str]:
    """A field that sets the width of experts, and keys with its value that speak of a size of experts and that transformers keeps but
    never reads.

    Engines do: vLLM sizes experts of `hy_v3` by `expert_hidden_dim`, which its checkpoints have beside `moe_intermediate_size`. What
    speaks of shared experts is their size, and what counts experts, such as `num_local_experts`, may have the same value by chance.
    """
    read = set(config.attribute_map.values())  # under another name
    alike = [key for key in fields_with_value(config, getattr(config, name)) if not hasattr(type(config), key)]
    return [name, *(key for key in alike if key not in read and _is_size_of_experts(key))]


def _is_size_of_experts(key: str) -> bool:
    of_experts = ("expert" in key or "moe" in key) and "shared" not in key
    return of_experts and any(word in key for word in ("size", "dim", "width", "hidden", "intermediate"))


def has_expert_shapes(
    skeleton: PreTrainedModel, blocks: list[ExpertBlock], width: int, experts: int | None = None
) -> bool:
    """Whether the expert blocks of `skeleton` are those of `blocks` with this width, and this number of experts if one is given."""
    for block in blocks:
        try:
            module = skeleton.get_submodule(block.path)
        except AttributeError:
            return False
        wanted = (width, block.hidden_size) if module.is_transposed else (block.hidden_size, width)
        if tuple(module.down_proj.shape) != (experts or block.num_experts, *wanted):
            return False
    return True


def changed_tensors(model: PreTrainedModel, blocks: list[ExpertBlock], skeleton: PreTrainedModel) -> list[str]:
    """Parameters and buffers outside the expert blocks whose shape differs, or that only one of the two has."""
    own = tuple(f"{block.path}." for block in blocks)
    before, after = (
        {name: tensor.shape for name, tensor in _tensors(whole).items() if not name.startswith(own)}
        for whole in (model, skeleton)
    )
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


class ExpertRows(NamedTuple):
    """Where a tensor of a router has its experts.

    Attributes:
        axis (`int`): the dimension with an entry for each routed expert.
        block (`str`): path of the block of these experts.
    """

    axis: int
    block: str

    def select(self, tensor: torch.Tensor, experts: list[int]) -> torch.Tensor:
        """The entries of these experts, in this order."""
        return tensor.index_select(self.axis, torch.tensor(experts, device=tensor.device))


@dataclass(frozen=True)
class Routing:
    """What of a model depends on how many routed experts its layers have.

    Attributes:
        field (`str`): of the configuration, sets the number.
        rows (`dict[str, ExpertRows]`): parameters and buffers outside the blocks with an entry for each expert: weights, biases
            and correction biases of routers.
    """

    field: str
    rows: dict[str, ExpertRows]


def find_routing(model: PreTrainedModel, blocks: list[ExpertBlock]) -> Routing:
    """Which field sets the number of experts, and what besides the experts has a row for each.

    Args:
        model (`PreTrainedModel`): its weights are not read.
        blocks (`list[ExpertBlock]`): its expert blocks.

    Raises:
        HeaprError: if no single field does, or something depends on it in a way that rows cannot be taken out of.
    """
    config, counts = experts_config(model, blocks), sorted({block.num_experts for block in blocks})
    for name in fields_with_value(config, counts[0]) if len(counts) == 1 else ():
        doubled = build(model, blocks, {name: 2 * counts[0]})
        if doubled is not None and has_expert_shapes(doubled, blocks, blocks[0].width, 2 * counts[0]):
            return Routing(name, _rows(model, blocks, doubled, name))
    raise HeaprError(
        f"model={model_name(model)!r} (model_type {model.config.model_type!r}): no single field of {type(config).__name__} "
        f"sets the number of experts of all layers ({', '.join(map(str, counts))}), so none can go from the router; leave "
        "num_experts out"
    )


def describe_routing(model: PreTrainedModel, blocks: list[ExpertBlock]) -> dict[str, Any]:
    """What planning has to know of routers to take experts out of them, as plain JSON types.

    Returns:
        `dict`: `experts_per_token`; `groups` of neighbouring experts, of which a token gets the best `groups_per_token`; and
        how many `parameters` and `bytes` go with one expert of every layer besides its atomic experts: rows of routers and
        biases of outputs. Or, where none can go, `refusal` alone, which says why.
    """
    try:
        routing = find_routing(model, blocks)
    except HeaprError as error:
        return {"refusal": str(error)}
    config, parameters = experts_config(model, blocks), dict(model.named_parameters())
    numel, size = 0, 0
    parts = [parameters[name] for name in routing.rows if name in parameters]
    parts += [block.module.down_proj_bias for block in blocks if block.module.has_bias]
    for part in parts:
        numel += part.numel() // blocks[0].num_experts
        size += part.nbytes // blocks[0].num_experts
    return {
        "experts_per_token": experts_per_token(model),
        "groups": getattr(config, "n_group", None) or 1,
        "groups_per_token": getattr(config, "topk_group", None) or 1,
        "parameters": numel,
        "bytes": size,
    }


def _rows(
    model: PreTrainedModel, blocks: list[ExpertBlock], doubled: PreTrainedModel, field: str
) -> dict[str, ExpertRows]:
    before, after, count = _tensors(model), _tensors(doubled), blocks[0].num_experts
    beside = tuple(f"{block.path.rpartition('.')[0]}." for block in blocks)
    for name, tensor in before.items():
        if name.startswith(beside) and not tensor.is_floating_point():
            raise _refusal(model, f"{name} names experts by their numbers")
    rows = {}
    for name in changed_tensors(model, blocks, doubled):
        old, new = (tuple(tensors[name].shape) if name in tensors else () for tensors in (before, after))
        axes = [axis for axis, sizes in enumerate(zip(old, new)) if sizes[0] != sizes[1]]
        if len(old) != len(new) or len(axes) != 1 or (old[axes[0]], new[axes[0]]) != (count, 2 * count):
            raise _refusal(model, f"{field!r} sizes {name} as well, in another way")
        rows[name] = ExpertRows(axes[0], _block_beside(name, model, blocks))
    return rows


def _block_beside(name: str, model: PreTrainedModel, blocks: list[ExpertBlock]) -> str:
    """Path of the block that shares most of its path with a tensor."""
    parts = name.split(".")

    def shared(block: ExpertBlock) -> int:
        pairs = zip(parts, block.path.split("."))
        return next((index for index, (one, other) in enumerate(pairs) if one != other), len(parts))

    nearest = sorted(blocks, key=shared, reverse=True)
    if len(nearest) > 1 and shared(nearest[0]) == shared(nearest[1]):
        raise _refusal(model, f"{name} is no part of one layer")
    return nearest[0].path


def _refusal(model: PreTrainedModel, reason: str) -> HeaprError:
    return HeaprError(
        f"model={model_name(model)!r} (model_type {model.config.model_type!r}): {reason}, so no expert can go from its routers; "
        "leave num_experts out"
    )


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())  # tied ones under each of their names
