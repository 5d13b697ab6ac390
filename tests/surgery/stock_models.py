# Licensed under the Apache License, Version 2.0
"""Tiny models whose experts are wide enough for the widths of stock layouts, and plans made of random numbers."""

from __future__ import annotations

import copy

import torch

from optimum_heapr.configuration import HeaprConfig
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.fingerprint import model_fingerprint
from optimum_heapr.planning.allocation import allocate
from optimum_heapr.planning.plan import PruningPlan
from tests.modeling.test_families import make_config, make_model


WIDTH = 32


def wide_model(model_type: str, width: int = WIDTH, **changes) -> torch.nn.Module:
    """The tiny model of a family with experts of `width` atomic experts, and biases and norms that are not trivial."""
    config = make_config(model_type)
    part = config.get_text_config()
    name = "moe_intermediate_size" if hasattr(part, "moe_intermediate_size") else "intermediate_size"
    for field, value in {name: width, **changes}.items():
        setattr(part, field, value)
    model = make_model(model_type, config, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def random_plan(model: torch.nn.Module, seed: int = 0, widest: int | None = None, **options) -> PruningPlan:
    """A plan as if atomic experts had random importance; `widest` cuts all experts to that many at most."""
    config, blocks = HeaprConfig(**options), find_expert_blocks(model)
    generator = torch.Generator().manual_seed(seed)
    scores = {block.path: torch.rand(block.num_experts, block.width, generator=generator) for block in blocks}
    kept = {path: [indices[:widest] for indices in experts] for path, experts in allocate(scores, config, {}).items()}
    return PruningPlan(
        kept=kept,
        original_width={block.path: block.width for block in blocks},
        config=config,
        model=model_fingerprint(model, blocks),
        loss_increase={block.path: 0.0 for block in blocks},
        unreached={},
    )


def layout_plan(model: torch.nn.Module, layout: str) -> PruningPlan:
    """A plan that a layout makes something of: `padded` ends narrower than the model."""
    if layout == "padded":
        return random_plan(model, layout="padded", ratio=0.6, widest=20)
    return random_plan(model, layout=layout, ratio=0.3)


@torch.no_grad()
def masked_model(model: torch.nn.Module, plan: PruningPlan) -> torch.nn.Module:
    """What pruning must equal: a copy of the model with the removed columns of the down projections set to zero."""
    masked = copy.deepcopy(model)
    for block in find_expert_blocks(masked):
        for expert, kept in enumerate(plan.kept[block.path]):
            removed = torch.ones(block.width, dtype=torch.bool)
            removed[kept] = False
            block.down_rows(expert)[removed] = 0.0
    return masked


def token_ids() -> torch.Tensor:
    """Token ids [3, 20]."""
    return torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=token_ids()).logits
